"The command as a user meets it: real processes, broken photos, full pages. Each call that loads the model takes some 15 s."

import json, re, shutil, signal, subprocess, sys, time
from base64 import b64decode
from html.parser import HTMLParser
from importlib.resources import files
from io import BytesIO
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from mmneurons.weights import lm_folder

COMMAND = [sys.executable, '-m', 'mmneurons.cli']
GALLERY = files('mmneurons') / 'assets' / 'gallery'
GOOD = ['cmyk.jpg', 'deep.png', 'palette.png', 'animated.gif', 'rotated.jpg', 'dot.png', 'huge.jpg']
BAD = {
    'missing.jpg': 'no such file',
    'empty.jpg': 'empty',
    'truncated.jpg': 'is truncated',
    'text.jpg': 'not an image',
    'folder': 'a folder',
}


def run(*args, cwd, **kwargs):
    "The finished process of one `mmneurons` command"
    return subprocess.run(
        [*COMMAND, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding='utf-8',
        timeout=600,
        **kwargs,
    )


def one_line_each(stderr):
    return [
        line for line in stderr.splitlines() if line.startswith('mmneurons: ')
    ] == stderr.splitlines()


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder with every kind of photo that people have"
    folder = tmp_path_factory.mktemp('photos')
    dog = Image.open(GALLERY / 'dog.jpg').convert('RGB')
    dog.convert('CMYK').save(folder / 'cmyk.jpg')
    grey = np.asarray(dog.convert('L'))
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / 'deep.png')
    cut = dog.copy()
    cut.putalpha(
        Image.fromarray(
            np.where(np.indices(grey.shape)[0] < grey.shape[0] // 2, 0, 255).astype(np.uint8)
        )
    )
    cut.quantize(64).save(folder / 'palette.png')
    dog.save(
        folder / 'animated.gif', save_all=True, append_images=[Image.new('RGB', dog.size, 'red')]
    )
    exif = Image.Exif()
    exif[0x112] = 6  # turn by 90° to see it upright
    wide = dog.crop((0, 40, dog.width, dog.height - 40))
    wide.transpose(Image.Transpose.ROTATE_90).save(folder / 'rotated.jpg', exif=exif)
    Image.new('RGB', (1, 1), 'orange').save(folder / 'dot.png')
    Image.new('L', (12_000, 9_000), 120).save(folder / 'huge.jpg')
    (folder / 'empty.jpg').touch()
    (folder / 'truncated.jpg').write_bytes((GALLERY / 'dog.jpg').read_bytes()[:9000])
    (folder / 'text.jpg').write_text('not an image at all')
    (folder / 'folder').mkdir()
    return folder


@pytest.fixture(scope='module')
def looked(photos):
    "One call with all of them, good and bad ones mixed; that the weights are being prepared was said before"
    lm_folder('gemma3-270m')
    names = [*BAD][:3] + GOOD + [*BAD][3:]
    return run('look', *names, '--target', 'dog', '--k', 3, '--out', 'pages', cwd=photos)


def test_bad_photos_get_one_line_and_the_others_are_done(looked, photos):
    assert looked.returncode == 1 and one_line_each(looked.stderr), looked.stderr
    assert 'Traceback' not in looked.stderr
    for name, reason in BAD.items():
        lines = [line for line in looked.stderr.splitlines() if name in line]
        assert len(lines) == 1 and reason in lines[0], looked.stderr
    assert [line for line in looked.stdout.splitlines() if line in GOOD] == GOOD
    assert sorted(path.name for path in (photos / 'pages').iterdir()) == sorted(
        f'{Path(name).stem}.html' for name in GOOD
    )


class Page(HTMLParser):
    "The tags of a page with their attributes, and its text"

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ''
        self.source = path.read_text('utf-8')
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def images(self):
        return [
            Image.open(BytesIO(b64decode(img['src'].split(',')[1]))).convert('RGB')
            for img in self.all('img')
        ]


@pytest.mark.parametrize('name', GOOD)
def test_each_page_is_whole(looked, photos, name):
    page = Page(photos / 'pages' / f'{Path(name).stem}.html')
    photo, *heats = page.all('img')
    assert photo['src'].startswith('data:image/jpeg;base64,') and len(photo['alt']) > 20
    assert page.images()[0].size == (int(photo['width']), int(photo['height']))
    shown = len(page.all('button'))  # three that carried the word, at most three that mean it
    thumbs = [span for span in page.all('span') if span.get('class', '').startswith('thumb')]
    elsewhere = len(thumbs) - shown  # the gallery's images where a neuron is active
    assert 3 <= shown <= 6 and len(heats) == 2 * shown + elsewhere  # large and small
    assert 0 < elsewhere <= 6 * shown
    assert all(img['src'].startswith('data:image/png;base64,') for img in heats)
    assert (
        not any(page.all(tag) for tag in ('link', 'iframe', 'object', 'base'))
        and len(page.all('script')) == 1
    )
    assert not re.search(r'url\((?!data:)|@import', page.source)
    assert all('src' not in attrs or attrs['src'].startswith('data:') for _, attrs in page.tags)
    assert (
        page.all('html')[0]['lang'] == 'en' and len(page.all('h1')) == len(page.all('title')) == 1
    )
    ids = {attrs['id'] for _, attrs in page.tags if 'id' in attrs}
    assert all(
        attrs['aria-labelledby'] in ids for _, attrs in page.tags if 'aria-labelledby' in attrs
    )
    assert 'Gemma Terms of Use' in page.text and 'random neurons' in page.text
    names = re.findall(r'\bL\d+\.u\d+\([+−]\)', page.text)
    assert len(names) == 3 * shown + 1  # button, panel and table, and the example at the end


def test_images_are_read_right(looked, photos):
    def photo(name):
        return Page(photos / 'pages' / f'{name}.html').images()[0]

    assert photo('rotated').width > photo('rotated').height  # upright
    assert np.asarray(photo('palette'))[:100].min() > 240  # transparent is white
    assert np.asarray(photo('animated'))[..., 1].mean() > 40  # the first frame, not the red one
    assert 40 < np.asarray(photo('deep')).mean() < 220  # sixteen bits scaled, not cut off
    assert photo('huge').size == (960, 720) and photo('dot').size == (960, 960)


def test_json_and_one_page_for_all(tmp_path):
    for name in ('dog', 'boat'):
        shutil.copy(GALLERY / f'{name}.jpg', tmp_path)
    done = run(
        'look', 'dog.jpg', 'gone.jpg', 'boat.jpg', '--json', '--out', 'all.html', cwd=tmp_path
    )
    dog, gone, boat = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 1 and gone == dict(
        image='gone.jpg', error='gone.jpg: there is no such file'
    )
    for found in (dog, boat):
        assert {
            'caption',
            'target',
            'p_target',
            'trust',
            'relation',
            'seed',
            'weights',
        } < found.keys()
        assert found['page'] == 'all.html' and 0 < found['p_target'] <= 1
        assert len(found['carried']) == 5 and len(found['carried'][0]['tokens']) == 10
        scores = [n['score'] for n in found['carried']]
        assert scores == sorted(scores, reverse=True)
        points = [('nothing', 0)]
        points += [(arm, n) for arm in ('top', 'wrong word', 'random') for n in (1, 5, 10, 25)]
        assert [(arm['arm'], arm['n_ablated']) for arm in found['ablation']] == points
    page = Page(tmp_path / 'all.html')
    assert (
        len(page.all('article')) == 2
        and page.source.count('class="heat"')
        == sum(len(f['carried'] + f['means']) for f in (dog, boat))
        and 'Other images where it is active' in page.text
    )


def test_nothing_heavy_before_it_is_needed(tmp_path):
    code = (
        "import sys; from mmneurons.cli import main, make_parser; make_parser().format_help();"
        "assert main(['look', 'a.jpg', 'b.jpg']) == 1; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 2, done.stderr


@pytest.mark.parametrize(
    'args, status, said',
    [
        (['--version'], 0, 'mmneurons 0.'),
        (['look', '--help'], 0, 'exit status:'),
        ([], 2, 'examples:'),
        (['look'], 2, 'IMAGE'),
        (['look', '--kk', '3', 'dog.jpg'], 2, 'usage: mmneurons look'),
        (['look', 'dog.jpg', '--k', '0'], 2, 'whole number'),
        (['look', 'dog.jpg', '--model', 'gpt-5'], 2, 'pocket'),
        (['look', 'dog.jpg', '--model', 'limber-nfrn50'], 2, 'so there are no patches'),
        (['look', 'dog.jpg', '--projection', 'gone.safetensors'], 2, 'gone.safetensors'),
        (['look', 'dog.jpg', '--device', 'gpu'], 2, 'use cpu, cuda or mps'),
        (['notebooks', 'dog.jpg'], 1, 'dog.jpg: there is a file of that name; name another folder'),
        (['sweep', '--data', '.', '--out', 'run'], 1, 'write folder:.'),
        (['train', '--data', 'corpus:nowhere', '--out', 'run'], 1, 'mmneurons corpus nowhere'),
        (['train', '--data', 'flickr:nowhere', '--out', 'run'], 1, 'begins with one of'),
        (['train', '--help'], 0, 'webdataset:PATTERN'),
        (['sweep', '--help'], 0, 'folder:FOLDER[,captions=CSV][,file=COLUMN]'),
        (
            ['train', '--data', 'corpus:nowhere', '--out', 'run', '--keep', '2'],
            1,
            'keep=2.0; it lies between',
        ),
    ],
    ids=lambda v: ' '.join(v) if isinstance(v, list) else None,
)
def test_ways_out(tmp_path, args, status, said):
    shutil.copy(GALLERY / 'dog.jpg', tmp_path)
    done = run(*args, cwd=tmp_path)
    assert (
        done.returncode == status
        and said in done.stdout + done.stderr
        and 'Traceback' not in done.stderr
    ), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ['dog.jpg']


def test_a_projection_of_another_model_is_refused_with_both_shapes(tmp_path):
    shutil.copy(GALLERY / 'dog.jpg', tmp_path)
    save_file(
        dict(weight=torch.zeros(64, 32), bias=torch.zeros(64)), tmp_path / 'other.safetensors'
    )
    done = run('look', 'dog.jpg', '--projection', 'other.safetensors', cwd=tmp_path)
    assert (
        done.returncode == 2
        and one_line_each(done.stderr)
        and '(64, 32)' in done.stderr
        and '(640, 1280)' in done.stderr
    ), done.stderr


def test_a_page_of_somebody_else_is_left_alone(tmp_path):
    shutil.copy(GALLERY / 'dog.jpg', tmp_path / 'index.jpg')
    (tmp_path / 'index.html').write_text('<p>my own')
    done = run('look', 'index.jpg', cwd=tmp_path)
    assert (
        done.returncode == 1
        and 'leaves it alone' in done.stderr
        and (tmp_path / 'index.html').read_text() == '<p>my own'
    )


def test_interrupted(tmp_path):
    shutil.copy(GALLERY / 'dog.jpg', tmp_path)
    process = subprocess.Popen(
        [*COMMAND, 'look', 'dog.jpg'], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert 'loading' in process.stderr.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == '' and process.returncode == -signal.SIGINT


def test_a_reader_that_leaves(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, 'look', 'gone.jpg', '--json'],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert (
        process.stderr.read().splitlines() == ['mmneurons: gone.jpg: there is no such file']
        and process.wait(60) == 141
    )


def test_training_from_the_command_line(tmp_path):
    (tmp_path / 'corpus').mkdir()
    rows = ['image_id,file,mask,caption,noun,split']
    for i, name in enumerate(['dog', 'cat', 'boat', 'bus']):
        shutil.copy(GALLERY / f'{name}.jpg', tmp_path / 'corpus')
        rows.append(f'{name},{name}.jpg,,a {name}.,{name},{"val" if i == 3 else "train"}')
    rows.append('cow,cow.jpg,,a cow.,cow,train')  # an image that is not there
    (tmp_path / 'corpus' / 'manifest.csv').write_text('\n'.join(rows))
    args = 'train --data corpus:corpus --out run --steps 2 --batch-size 2 --warmup 1 --val-every 1 --checkpoint-every 1'.split()
    done = run(*args, cwd=tmp_path)
    assert (
        done.returncode == 0 and 'after 2 steps' in done.stdout and 'Traceback' not in done.stderr
    ), done.stderr
    assert (
        'images left out: 1, see run/left-out.csv; the first: cow: corpus/cow.jpg: there is no such file'
        in done.stderr
    )
    assert load_file(tmp_path / 'run' / 'projection.safetensors')['weight'].shape == (640, 1280)
    assert {path.name for path in (tmp_path / 'run').iterdir()} == {
        'projection.safetensors',
        'checkpoint.pt',
        'log.csv',
        'samples.csv',
        'curve.png',
        'left-out.csv',
    }


def test_an_interruption_keeps_the_page_of_what_was_found(tmp_path, monkeypatch):
    from mmneurons import report
    from mmneurons.cli import looks, make_parser
    from mmneurons.model import tiny_model

    tiny_model(seed=5).save_pretrained(tmp_path / 'pair', whole=True)
    look, page = report.look, tmp_path / 'report.html'

    def once(mm, image, *args, image_id, **how):
        if 'horse' in image_id:
            raise KeyboardInterrupt
        return look(mm, image, *args, image_id=image_id, **how)

    monkeypatch.setattr(report, 'look', once)
    images = [str(GALLERY / f'{name}.jpg') for name in ('red-car', 'horse')]
    options = ['--model', str(tmp_path / 'pair'), '--target', 'dog', '--out', str(page)]
    with pytest.raises(KeyboardInterrupt):
        list(looks(make_parser().parse_args(['look', *images, *options])))
    assert 'red-car.jpg' in page.read_text('utf-8')
