"""What the scores of all neurons cost, as ratios to one bare forward and backward pass on the same model.

    python benchmarks/attribution.py --model gptj12            a GPT-J of 12 layers, width 768, random weights, 200 positions
    python benchmarks/attribution.py --model pocket            the pocket model
    python benchmarks/attribution.py --memory 1000             memory over many images
    python benchmarks/attribution.py --model gptj6b            GPT-J-6B's shape, random weights, on a GPU: images a second, share of the matmul rate

nnsight and transformer-lens (before 4) are measured where they are installed. Every way runs once unmeasured and then in turns with
the others; the median counts. The table goes to --out as csv. "one pass" puts all eight images into one: on Linux its tensors
are so large that each is taken from the system anew and given back after use, unless MALLOC_MMAP_MAX_=0
MALLOC_TRIM_THRESHOLD_=17179869184 stands in the environment.
"""

import argparse, gc, json, os, platform, statistics, sys, time
from functools import partial

import pandas as pd, torch, transformers
from transformers import AutoModelForCausalLM

from mmneurons.activations import default_baseline
from mmneurons.attribution import METHODS, attribute_all, passes, reduce_positions
from mmneurons.targets import Target
from mmneurons.data import gallery
from mmneurons.encoders import ENCODERS, Encoder
from mmneurons.pairs import ModelConfig
from mmneurons.model import MultimodalLM, tiny_model

SHAPES = dict(
    gptj12=dict(
        n_embd=768, n_layer=12, n_head=12, rotary_dim=64, n_positions=256, vocab_size=50400
    ),
    gptj6b=dict(
        n_embd=4096, n_layer=28, n_head=16, rotary_dim=64, n_positions=2048, vocab_size=50400
    ),
)


def gptj(name, device, dtype):
    "GPT-J of some shape with random weights, behind an encoder of 196 patches"
    config = transformers.AutoConfig.for_model('gptj', **SHAPES[name])
    torch.manual_seed(0)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    spec = dict(
        name='beit_base_patch16_224',
        image_size=(224, 224),
        kwargs=dict(embed_dim=24, depth=1, num_heads=2),
    )
    return MultimodalLM(
        Encoder(type(ENCODERS['tiny-beit'])(**spec)),
        lm,
        tiny_model().tokenizer,
        ModelConfig('gptj', 'tiny-beit'),
    ).to(device)


class Case:
    "One model, one image, one word, and the ways to score it"

    def __init__(self, mm):
        self.mm, self.t = mm, Target('dog', 8, [4, 7])
        torch.manual_seed(0)
        self.images = [ex.image for ex in gallery()[:8]]
        self.seen = list(mm.see_all(self.images, False))
        self.baseline = default_baseline(mm)
        self.x = mm.embed(self.seen[0].soft_prompt, self.t.text_ids).detach()
        self.down = [mm.down(l) for l in range(mm.n_layers)]

    def bare(self):
        x = self.x.clone().requires_grad_()
        self.mm(x)[0, self.t.token_id].backward()

    def ours(self, n=1, targets=None, keep=None, way=METHODS['grad_x_act'], **options):
        targets = targets or [self.t]
        out = {}

        def each(layer, row, i, scores, acts, change):
            if keep is not None:
                keep[layer] = scores
            out[row, i, layer] = reduce_positions(scores, acts, change, 'max', True)

        way(self.mm, self.seen[:n], [targets] * n, each, 'image', **options)
        return torch.stack([out[0, 0, l]['scores'] for l in range(self.mm.n_layers)])

    def contrast(self):
        self.ours(way=METHODS['contrast'], baseline=self.baseline)

    def three(self):
        self.ours(
            targets=[Target('dog', 8, [4, 7]), Target('cat', 9, [4, 7]), Target('boat', 11, [4, 7])]
        )

    def eight(self):
        self.ours(8)

    def eight_at_once(self):
        def at_once(mm, seen, *rest):
            return passes(mm, torch.cat([s.soft_prompt for s in seen]), *rest)

        self.ours(8, way=at_once)

    def call(self, n=1):
        list(attribute_all(self.mm, self.images[:n], 'dog', baseline=self.baseline))

    def captum_list(self):
        from captum.attr import LayerGradientXActivation

        return LayerGradientXActivation(self.mm, self.down).attribute(
            self.x.clone().requires_grad_(), target=self.t.token_id, attribute_to_layer_input=True
        )

    def captum_loop(self):
        from captum.attr import LayerGradientXActivation

        for d in self.down:
            LayerGradientXActivation(self.mm, d).attribute(
                self.x.clone().requires_grad_(),
                target=self.t.token_id,
                attribute_to_layer_input=True,
            )

    def nnsight(self):
        from nnsight import NNsight, save

        if not hasattr(self, 'nn'):
            self.nn = NNsight(self.mm.lm)
        acts = []
        with self.nn.trace(
            inputs_embeds=self.x.clone().requires_grad_(), logits_to_keep=1, use_cache=False
        ):
            for block in (
                self.nn.transformer.h
                if hasattr(self.mm.lm, 'transformer')
                else self.nn.model.layers
            ):
                down = (
                    block.mlp.fc_out if hasattr(self.mm.lm, 'transformer') else block.mlp.down_proj
                )
                acts.append(down.input)
            y = (self.nn.lm_head.output)[0, -1, self.t.token_id]
            grads = save(list())
            with y.backward():
                for a in reversed(acts):
                    grads.append(a * a.grad)
        return grads


def lens_case(case):
    "TransformerLens with a model of the same shape; weights as it leaves them, and frozen"
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    c = case.mm.lm.config
    cfg = HookedTransformerConfig(
        n_layers=c.n_layer,
        d_model=c.n_embd,
        n_ctx=256,
        d_head=c.n_embd // c.n_head,
        n_heads=c.n_head,
        d_vocab=c.vocab_size,
        act_fn='gelu_new',
        parallel_attn_mlp=True,
        positional_embedding_type='rotary',
        rotary_dim=c.rotary_dim,
        normalization_type='LN',
        seed=0,
    )
    model = HookedTransformer(cfg)

    def run(frozen):
        for p in model.parameters():
            p.requires_grad_(not frozen)
        model.zero_grad()
        acts, out = {}, {}

        def fwd(a, hook):
            acts[hook.name] = a.detach()

        def bwd(g, hook):
            out[hook.name] = (acts.pop(hook.name) * g).amax(1)

        model.reset_hooks()
        names = [f'blocks.{l}.mlp.hook_post' for l in range(c.n_layer)]
        for n in names:
            model.add_hook(n, fwd, 'fwd')
            model.add_hook(n, bwd, 'bwd')
        x = case.x.clone().requires_grad_()
        model(x, start_at_layer=0)[0, -1, case.t.token_id].backward()
        model.reset_hooks()

    return partial(run, False), partial(run, True)


def timed(ways, repeats):
    "Median seconds of each way, measured in turns"
    took = {k: [] for k in ways}
    for n in range(repeats + 1):
        for k, way in ways.items():
            gc.collect()
            t = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if n:
                took[k].append(time.perf_counter() - t)
    return {k: statistics.median(v) for k, v in took.items()}


def rss():
    return (
        int(next(l for l in open('/proc/self/status') if l.startswith('VmRSS')).split()[1]) / 1024
    )


def memory(mm, n):
    "Resident memory, in MB, after the first ten and after `n` images"
    images, seen = [ex.image for ex in gallery()], {}
    stream = attribute_all(mm, (images[i % len(images)] for i in range(n)), batch_size=4)
    for i, a in enumerate(stream):
        if i + 1 in (12, n // 2, n):
            seen[i + 1] = round(rss())
    return seen


def on_gpu(args):
    "GPT-J-6B's shape: images a second, and the share of the matrix products' own rate"
    mm = gptj('gptj6b', 'cuda', torch.bfloat16)
    case = Case(mm)
    a, b = (torch.randn(8192, 8192, device='cuda', dtype=torch.bfloat16) for _ in range(2))
    took = timed(
        dict(matmul=lambda: [a @ b for _ in range(20)], one=case.ours, eight=case.eight),
        args.repeats,
    )
    rate = 20 * 2 * 8192**3 / took['matmul']
    flop = 4 * sum(p.numel() for n, p in mm.lm.named_parameters() if '.h.' in n) * case.x.shape[1]
    return dict(
        images_a_second=8 / took['eight'],
        single=1 / took['one'],
        matmul_tflops=rate / 1e12,
        share_of_matmul=8 * flop / took['eight'] / rate,
    )


def main(args):
    if args.model == 'gptj6b':
        return print(json.dumps(on_gpu(args)))
    mm = (
        MultimodalLM.from_pretrained('pocket', device='cpu')
        if args.model == 'pocket'
        else tiny_model(args.model[5:])
        if args.model[:5] == 'tiny-'
        else gptj(args.model, 'cpu', torch.float32)
    )
    if args.memory:
        return print(json.dumps(memory(mm, args.memory)))
    case = Case(mm)
    ways = {
        'bare': case.bare,
        'ours': case.ours,
        'ours, contrast': case.contrast,
        'ours, three targets': case.three,
        'ours, eight images': case.eight,
        'ours, eight images, one pass': case.eight_at_once,
        'attribute()': case.call,
        'attribute(), eight images': partial(case.call, 8),
        'captum, list': case.captum_list,
        'captum, loop': case.captum_loop,
    }
    for name, more in (
        ('nnsight', lambda: {'nnsight': case.nnsight}),
        (
            'TransformerLens',
            lambda: dict(zip(('TransformerLens', 'TransformerLens, frozen'), lens_case(case))),
        ),
    ):
        try:
            new = more()
            [way() for way in new.values()]
            ways |= new
        except Exception as e:
            print(
                f'{name} is left out: {type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ""}',
                file=sys.stderr,
            )
    keep = {}
    top32, theirs = case.ours(keep=keep).flatten().topk(100).indices, case.captum_list()
    agree = max(
        ((t[0, mm.image_positions] - keep[l]).abs().max() / t.abs().max()).item()
        for l, t in enumerate(theirs[:-1])
    )
    took = timed(ways, args.repeats)
    mm.lm.to(torch.bfloat16)
    case.x = case.x.bfloat16()
    top16 = case.ours().flatten().topk(100).indices
    took |= timed({'ours, bfloat16': case.ours}, args.repeats)
    ratio = {k: v / took['bare'] / (8 if 'eight' in k else 1) for k, v in took.items()}
    table = pd.DataFrame(
        dict(
            model=args.model,
            way=list(took),
            seconds=list(took.values()),
            times_bare=list(ratio.values()),
        )
    )
    print(table.round(3).to_string(index=False))
    facts = dict(
        captum_relative=agree,
        bfloat16_top100=len(set(top16.tolist()) & set(top32.tolist())),
        threads=torch.get_num_threads(),
        eight_to_single=took['ours, eight images'] / 8 / took['ours'],
        eight_to_single_call=took['attribute(), eight images'] / 8 / took['attribute()'],
        three_targets=took['ours, three targets'] / took['bare'],
        cpu=platform.processor() or platform.machine(),
        malloc=os.environ.get('MALLOC_MMAP_MAX_', ''),
        load=os.getloadavg()[0],
    )
    print(json.dumps(facts))
    if args.out:
        table.assign(
            **{
                k: facts[k]
                for k in ('captum_relative', 'bfloat16_top100', 'threads', 'malloc', 'load')
            }
        ).to_csv(
            args.out,
            mode='a',
            header=not os.path.exists(args.out),
            index=False,
            float_format='%.4g',
        )


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--model',
        default='gptj12',
        help='gptj12, pocket, gptj6b (GPU), tiny-gptj, tiny-gemma3_text',
    )
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--memory', type=int, default=0, metavar='IMAGES')
    parser.add_argument('--out')
    main(parser.parse_args())
