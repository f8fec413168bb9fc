"""Whether the goals of speed and memory are met: ratios in one run, in seconds of the processor on a CPU.

    python benchmarks/performance.py                             curve, attribution, memory and decoding of all neurons
    python benchmarks/performance.py --goals curve -n 5          only some of them, on more images
    python benchmarks/performance.py --goals look --before OLD   OLD is a checkout of the commit that is compared with:
                                                                 git worktree add OLD 6ba6547

Both ways of a ratio run in turns in one process; the two versions of `look` run in two. The median of the ratios counts, and the
lowest and the highest are its spread. Seconds of the processor do not depend on what else runs on the same cores. The rows go to
nbs/data/performance.csv, in place of older ones of the same goal.
"""

import argparse, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import pandas as pd, torch, transformers
from ablation import ways
from attribution import Case
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmneurons.ablation import paper_arms, paper_ks
from mmneurons.attribution import attribute, top_neurons
from mmneurons.data import Reader, gallery
from mmneurons.decoding import decode_all
from mmneurons.encoders import Encoder, encoder_spec
from mmneurons.model import MultimodalLM, tiny_model
from mmneurons.pairs import ModelConfig
from mmneurons.sweeps import SweepConfig, sweep
from mmneurons.weights import lm_folder

TABLE = Path(__file__).resolve().parents[1] / 'nbs' / 'data' / 'performance.csv'
GOALS = {
    'look': ('seconds of `look`, of those at commit 6ba6547, without start-up', 0.6),
    'curve': ('seconds of a curve of 27 settings in batches, of those one by one', 0.3),
    'attribution': ('seconds an image, encoder and caption included, in bare passes', 1.4),
    'memory': ('growth of memory from image 1,000 of a sweep to its last, in MB', 40),
    'decoding': ('minutes to decode the 458,752 neurons of GPT-J', None),
}


def seconds(do):
    "Processor seconds of a call; those of the clock where a GPU works"
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    do()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


LOOK = """
import sys, time
from mmneurons.data import gallery
from mmneurons.model import MultimodalLM
from mmneurons.report import look
mm, how = MultimodalLM.from_pretrained('pocket', device='cpu'), {}
try:
    from mmneurons.activations import default_baseline
    how = dict(baseline=default_baseline(mm))
except ImportError:
    pass  # the older one keeps its own
for ex in list(gallery())[: int(sys.argv[1]) + 1]:  # the first one warms up
    start = time.process_time()
    look(mm, ex.image, **how)
    print('took', time.process_time() - start)
"""


def look(args):
    "The ratio of each image"
    trees = [Path(__file__).resolve().parents[1], Path(args.before).resolve()]
    took = []
    for tree in trees:
        env, command = os.environ | dict(PYTHONPATH=str(tree)), [sys.executable, '-c', LOOK]
        command += [str(args.n)]  # the working folder comes first on the path
        said = subprocess.run(command, env=env, cwd=tree, capture_output=True, text=True)
        lines = [line.split() for line in said.stdout.splitlines()]
        took.append([float(line[1]) for line in lines if line[0] == 'took'][1:])
        if not took[-1]:
            raise RuntimeError(said.stderr)
    return [new / old for new, old in zip(*took)]


def curve(args):
    "The ratio of each image"
    mm, ratios = MultimodalLM.from_pretrained('pocket'), []
    for ex in list(gallery())[: args.n]:
        a = attribute(mm, ex.image, image_id=ex.image_id)
        top = top_neurons(a, paper_ks(mm)[-1])
        arms = paper_arms(mm, top, top_neurons(a, 2 * len(top))[::2], seeds=(0,))
        arms['random'] = arms['random'][0]
        both = ways(mm, ex.image, a, arms, paper_ks(mm))
        ratios.append(seconds(both['batched']) / seconds(both['one_by_one']))
    return ratios


def attribution(args):
    "The ratio of each repetition: eight images at a time, from pixels to scores, to a pass forward and back"
    case = Case(MultimodalLM.from_pretrained('pocket'))
    case.bare(), case.call(8)
    return [seconds(lambda: case.call(8)) / 8 / seconds(case.bare) for _ in range(args.n)]


def memory(args):
    "By how much the resident memory grew after the first thousand images of a sweep, on a tiny model"
    data = gallery()
    rows = [dict(data.rows[i % len(data)], image_id=str(i)) for i in range(args.images)]
    cfg = SweepConfig(tasks=('attribute',), k=8, block=50, reference=8)
    with tempfile.TemporaryDirectory() as d:
        sweep(tiny_model(seed=5), Reader(rows, data.load), d, cfg)
        log = pd.read_csv(Path(d) / 'log-0.csv')
    late = log[log.n.cumsum() >= 1000].memory_mb
    return [late.max() - late.iloc[0]]


def decoding(args):
    "Minutes for all 28 layers, from one of them: the width and the words of GPT-J, random weights, bfloat16"
    config = transformers.GPTJConfig(n_layer=1)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(lm_folder('gemma3-270m'))  # it has as many words
    spec = encoder_spec('tiny-beit')
    mm = MultimodalLM(Encoder(spec), lm, tokenizer, ModelConfig('gptj', 'tiny-beit'))
    with tempfile.TemporaryDirectory() as d:
        return [28 * seconds(lambda: decode_all(mm, f'{d}/all.parquet')) / 60]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--goals', default=','.join([*GOALS][1:]), help='with commas')
    parser.add_argument('-n', type=int, default=3, help='images, or repetitions')
    parser.add_argument('--images', type=int, default=10_000, help='of the sweep')
    parser.add_argument('--before', help='a checkout of the older version, for look')
    args = parser.parse_args(argv)
    for goal in args.goals.split(','):
        what, limit = GOALS[goal]
        found = globals()[goal](args)
        n = args.images if goal == 'memory' else len(found)
        value = statistics.median(found)
        met = '' if limit is None else 'yes' if value <= limit else 'no'
        row = dict(goal=goal, what=what, limit=limit, found=value, met=met, n=n)
        row |= dict(lowest=min(found), highest=max(found))
        old = [pd.read_csv(TABLE, keep_default_na=False)] if TABLE.exists() else []
        table = pd.concat([*old, pd.DataFrame([row])]).drop_duplicates('goal', keep='last')
        table = table.set_index('goal').reindex([g for g in GOALS if g in set(table.goal)])
        table.round(3).to_csv(TABLE)
        print(table.loc[goal].to_string(), flush=True)


if __name__ == '__main__':
    main()
