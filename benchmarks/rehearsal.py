"""A rehearsal of the paper's pair at full size, with random weights: does every step run here, how long, in how much memory?

    python benchmarks/rehearsal.py FOLDER                     GPT-J and BEiT-L: 14 GB of disk, over 18 GB of memory in bfloat16
    python benchmarks/rehearsal.py FOLDER --size small        half a minute: the same files, small
    python benchmarks/rehearsal.py FOLDER --size loading      only what loading takes, beside transformers' own way

    python benchmarks/rehearsal.py FOLDER --reference 1 --images 1 --ks 0,6400      every step, on as few images as it can be

It writes what a hub would give, in the layout of its cache: GPT-J as one `pytorch_model.bin` in half precision with the old
buffers, BEiT with its masked-image head, a tokenizer like GPT-2's, and LiMBeR's `proj.ckpt`. Then it runs the commands on it, each
in a process of its own, offline, and says for each: seconds, seconds of the processor (which other programs on the same cores do
not change), the peak of its resident memory, the memory that the command announced, and its exit status. With --out they go to a
table, whose rows of the same step are replaced. The last line gives this machine's rate in matrix products, and the share of it that
the attribution reached.

The weights are random, so captions and neurons mean nothing; shapes, files, memory and time are those of the paper's pair.
"""

import argparse, json, os, platform, re, shutil, subprocess, sys, time
from importlib.resources import files
from pathlib import Path

import pandas as pd, torch
from tokenizers import ByteLevelBPETokenizer
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, BeitConfig, BeitForMaskedImageModeling, GPTJConfig

from mmneurons.decoding import english_words
from mmneurons.encoders import ENCODERS
from mmneurons.pairs import PRESETS

LIMBER = PRESETS['limber-beit']
SIZES = {
    'full': dict(lm={}, beit={}),
    'loading': dict(lm=dict(n_layer=8, n_embd=2048), beit={}),
    'small': dict(
        lm=dict(n_layer=2, n_embd=64, n_head=4, rotary_dim=8),
        beit=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
    ),
}
TASKS = 'attribute,decode,masks,ablate,scores'


def write_checkpoint(file, make, seed):
    "A checkpoint with random weights, written tensor by tensor: the file may be larger than the memory"
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(make(), file)
    with FakeTensorMode():
        places = torch.load(file, weights_only=True)
    draw = torch.Generator().manual_seed(seed)
    with open(file, 'r+b') as f:
        for name, fake in places.items():
            if not fake.is_floating_point():
                content = torch.ones(fake.shape, dtype=fake.dtype)
            elif fake.ndim < 2:  # biases are zeros, norms and layer scales are not
                value = float(not name.endswith('bias'))
                content = torch.full(fake.shape, value, dtype=fake.dtype)
            else:
                content = torch.empty(fake.shape).normal_(std=0.02, generator=draw).to(fake.dtype)
            f.seek(fake.untyped_storage()._checkpoint_offset)
            f.write(content.numpy().tobytes())


def snapshot(home, repository, revision):
    "An empty folder where the hub's cache keeps one revision of a repository"
    root, commit = home / 'hub' / f'models--{repository.replace("/", "--")}', 'c' * 40
    folder = root / 'snapshots' / commit
    folder.mkdir(parents=True)
    (root / 'refs').mkdir()
    (root / 'refs' / revision).write_text(commit)
    return folder


def write_tokenizer(folder, size):
    "A byte-level tokenizer of English words, with GPT-2's end token last"
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    words = sorted(english_words())
    lines = (f'a picture of {word}s and a {word}' for word in words)
    end = '<|endoftext|>'
    bpe.train_from_iterator(lines, vocab_size=size - 1, min_frequency=1, show_progress=False)
    bpe.add_special_tokens([end])
    bpe.save_model(str(folder))
    bpe.save(str(folder / 'tokenizer.json'))
    about = dict(tokenizer_class='GPT2Tokenizer', bos_token=end, eos_token=end, unk_token=end)
    (folder / 'tokenizer_config.json').write_text(json.dumps(about))
    (folder / 'config.json').write_text(json.dumps(dict(model_type='gpt2')))
    return bpe.get_vocab_size()


def write_pair(home, size):
    "Both models, the tokenizer and the projection"
    small = size == 'small'
    words = write_tokenizer(snapshot(home, LIMBER.tokenizer, 'main'), 2000 if small else 50257)
    end = dict(bos_token_id=words - 1, eos_token_id=words - 1)
    config = GPTJConfig(**SIZES[size]['lm'], vocab_size=words + 143, **end)
    folder = snapshot(home, LIMBER.lm, LIMBER.lm_revision)
    config.save_pretrained(folder)

    def language_model():
        own = AutoModelForCausalLM.from_config(config, dtype=torch.float16).state_dict()
        for i in range(config.n_layer):  # buffers that older versions of transformers stored
            seen = (1, 1, config.n_positions, config.n_positions)
            own[f'transformer.h.{i}.attn.bias'] = torch.ones(seen, dtype=torch.bool)
            own[f'transformer.h.{i}.attn.masked_bias'] = torch.tensor(-1e9).half()
        return own

    write_checkpoint(folder / 'pytorch_model.bin', language_model, seed=0)
    spec = ENCODERS[LIMBER.encoder]
    about = {k: v for k, v in spec.kwargs.items() if k != 'model_type'} | SIZES[size]['beit']
    beit = BeitConfig(**about)
    folder = snapshot(home, spec.name, spec.pretrained)
    beit.save_pretrained(folder)
    write_checkpoint(
        folder / 'pytorch_model.bin', lambda: BeitForMaskedImageModeling(beit).state_dict(), seed=1
    )
    rows = torch.randn(config.n_embd, beit.hidden_size, generator=torch.Generator().manual_seed(2))
    projection = dict(weight=0.02 * rows, bias=torch.zeros(config.n_embd))
    torch.save({k: v.half() for k, v in projection.items()}, home / 'proj.ckpt')


COMMAND = """
import sys
from dataclasses import replace
import mmneurons.encoders as encoders
from mmneurons.cli import main
row = encoders.ENCODERS['beit-large']
encoders.ENCODERS['beit-large'] = replace(row, kwargs=row.kwargs | eval(sys.argv.pop(1)))
sys.exit(main(sys.argv[1:]))
"""


def reference(home, n):
    "A folder with some images of the gallery, over which `look` takes what is usual"
    folder = home / f'reference-{n}'
    folder.mkdir(exist_ok=True)
    for file in sorted((files('mmneurons') / 'assets' / 'gallery').glob('*.jpg'))[:n]:
        shutil.copy(file, folder)
    return folder


def two_classes(home):
    "Folders of two classes with twenty images each, copies of the gallery's: what a concept needs"
    pictures = sorted((files('mmneurons') / 'assets' / 'gallery').glob('*.jpg'))
    for name, half in dict(dog=pictures[:10], car=pictures[10:]).items():
        folder = home / 'classes' / name
        folder.mkdir(parents=True, exist_ok=True)
        for copy in range(2):
            for file in half:
                shutil.copy(file, folder / f'{copy}-{file.name}')
    return home / 'classes'


def images_of(step, home, n):
    "How many images a step is given: `paper` and `atlas` read a run, `check` weights alone"
    if step == 'find':
        return sum(1 for _ in (home / 'classes').rglob('*.jpg'))
    return dict(look=1, sweep=n).get(step, 0)


def steps(home, images, args):
    "What is run: name and arguments of `mmneurons`"
    weights = ['--projection', home / 'proj.ckpt', '--dtype', args.dtype]
    weights += ['--device', args.device] if args.device else []
    weights += ['--bits', args.bits] if args.bits else []
    model = ['--model', 'limber-beit', *weights]
    counts = args.ks or ('0,6400' if args.size == 'full' else '0,10,50')
    run, some = home / 'run', ['--data', 'gallery', '--limit', args.images]
    sweep = [*some, '--ks', counts, '--block', 2, '--reference', args.reference]
    baseline = ['--baseline', reference(home, args.reference)]
    page = ['--out', home / 'look.html', '--target', 'dog']
    return {
        'look': ['look', images[0], *page, *baseline, *model],
        'sweep': ['sweep', *sweep, '--tasks', args.tasks, '--out', run, *model],
        'paper': ['paper', run],
        'atlas': ['atlas', run],
        'find': ['find', '--data', f'folders:{two_classes(home)}', '--out', home / 'found', *model],
        'check': ['check', 'limber-beit', *weights],
    }


def run(command, env):
    "What one process took: seconds, those of the processor, the peak of its resident memory in bytes; its exit status and lines"
    start = time.perf_counter()
    process = subprocess.Popen(
        [*map(str, command)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return dict(
        seconds=round(time.perf_counter() - start, 1),
        processor=round(used.ru_utime + used.ru_stime, 1),
        peak=used.ru_maxrss * 1024,
        status=process.returncode,
        lines=[line for line in said.strip().splitlines() if line.strip()],
    )


def announced(lines):
    "The gigabytes that a command said it needs; none for a small model"
    found = re.search(r' needs ([0-9.]+) GB on ', '\n'.join(lines))
    return float(found[1]) if found else None


def machine(device):
    "What the model runs on"
    if device != 'cpu' and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    file, threads = Path('/proc/cpuinfo'), torch.get_num_threads()
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
    return f'{[*names, platform.machine()][0]}, {threads} thread{"s" * (threads > 1)}'


def keep(table, rows):
    "Write rows into a table, in place of those of the same size, precision, machine and step"
    old = [pd.read_csv(table)] if Path(table).exists() else []
    both = pd.concat([*old, pd.DataFrame(rows)])
    both = both.drop_duplicates(['size', 'precision', 'machine', 'step'], keep='last')
    both.to_csv(table, index=False)


LOAD = """
import json, sys, torch
from mmneurons.encoders import encoder_spec
from mmneurons.pairs import PRESETS, load_lm, plan
from transformers import AutoModelForCausalLM
way, dtype = sys.argv[1], getattr(torch, sys.argv[2])
config = PRESETS['limber-beit']
needs = plan(config, encoder_spec(config.encoder), dtype).needs
if way == 'nothing':
    print(json.dumps(needs.to_dict()))
elif way == 'here':
    lm, _ = load_lm(config, dtype, 'cpu')
else:
    lm = AutoModelForCausalLM.from_pretrained(config.lm, revision=config.lm_revision, dtype=dtype)
if way != 'nothing':
    for p in lm.parameters():
        p.amax()
"""


def loading(env, dtypes=('float16', 'bfloat16', 'float32')):
    "Peak memory of loading the language model alone, beyond a process that only plans it, in units of its weights"
    rows = []
    for dtype in dtypes:
        base = run([sys.executable, '-c', LOAD, 'nothing', dtype], env)
        assert base['status'] == 0, base['lines']
        weights = json.loads(base['lines'][-1])['language model']
        for way in ('here', 'transformers'):
            done = run([sys.executable, '-c', LOAD, way, dtype], env)
            assert done['status'] == 0, done['lines']
            grown = (done['peak'] - base['peak']) / 1e9
            rows.append((dtype, way, done['seconds'], weights / 1e9, grown))
    table = pd.DataFrame(rows, columns=['dtype', 'way', 'seconds', 'weights, GB', 'peak, GB'])
    return table.assign(ratio=table['peak, GB'] / table['weights, GB'])


def matrix_rate(dtype, device, side=2048):
    "Multiplications and additions a second in large matrix products"
    a = torch.randn(side, side, dtype=getattr(torch, dtype), device=device or 'cpu')
    times = []
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a).sum())  # waits for a GPU too
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def share_of_rate(home, config, args):
    "What one attribution reached of the matrix rate, from the log of the sweep"
    log = pd.concat([pd.read_csv(file) for file in sorted((home / 'run').glob('log-*.csv'))])
    part = log[log.task == 'attribute']
    weights = config['n_layer'] * 12 * config['n_embd'] ** 2
    weights += config['n_embd'] * config['vocab_size']
    passes = 3 * 2 * weights * 199  # caption, forward, backward to the activations
    rate = matrix_rate(args.dtype, args.device)
    seconds = part.seconds.sum() / part.n.sum()
    return dict(
        matrix_gflop_s=round(rate / 1e9, 1),
        seconds_an_image=round(seconds, 2),
        share=round(passes / seconds / rate, 3),
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', type=Path, help='made anew; the files stay there')
    parser.add_argument('--size', choices=SIZES, default='full')
    parser.add_argument('--dtype', default='bfloat16', help='of the language model')
    parser.add_argument('--device', help='default: a GPU if there is one')
    parser.add_argument('--bits', type=int, help='8 or 4: of the quantised layers')
    parser.add_argument('--images', type=int, default=4, help='of the sweep')
    parser.add_argument('--reference', type=int, default=20, help='images of the baseline')
    parser.add_argument('--ks', help='how many neurons the sweep ablates, with commas')
    parser.add_argument('--tasks', default=TASKS, help='of the sweep')
    parser.add_argument('--steps', help='only these, with commas')
    parser.add_argument('--out', help='the table (csv) that gets the rows')
    args = parser.parse_args(argv)
    home = args.folder.absolute()
    if not (home / 'proj.ckpt').exists():
        start = time.perf_counter()
        write_pair(home, args.size)
        size = sum(f.stat().st_size for f in home.rglob('*') if f.is_file())
        print(f'written: {size / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s', flush=True)
    env = os.environ | dict(HF_HOME=str(home), HF_HUB_OFFLINE='1')
    env.pop('MMNEURONS_CACHE', None)
    if args.size == 'loading':
        print(loading(env).round(2).to_string(index=False))
        return 0
    images = [files('mmneurons') / 'assets' / 'gallery' / 'dog.jpg']
    rows, lm = [], next(home.glob('hub/models--EleutherAI*/snapshots/*/config.json'))
    for name, command in steps(home, images, args).items():
        if args.steps and name not in args.steps.split(','):
            continue
        for left in (home / 'run', home / 'found') if name in ('sweep', 'find') else ():
            shutil.rmtree(left, ignore_errors=True)
        command = [sys.executable, '-c', COMMAND, repr(SIZES[args.size]['beit']), *command]
        done = run(command, env)
        precision = f'{args.bits} bits' if args.bits else args.dtype
        about = dict(size=args.size, precision=precision, machine=machine(args.device))
        about |= dict(images=images_of(name, home, args.images), step=name)
        measured = {k: done[k] for k in ('seconds', 'processor', 'status')}
        measured |= dict(peak=round(done['peak'] / 1e9, 2), announced=announced(done['lines']))
        rows.append(about | measured)
        print(json.dumps(rows[-1]), flush=True)
        if done['status']:
            print('   ' + '\n   '.join(done['lines'][-12:]), flush=True)
        if name == 'sweep' and not done['status']:
            print(json.dumps(share_of_rate(home, json.loads(lm.read_text()), args)), flush=True)
        if args.out:
            keep(args.out, rows)
    # `check` refuses weights that are not the published ones
    return int(any(row['status'] != (row['step'] == 'check') for row in rows))


if __name__ == '__main__':
    sys.exit(main())
