"""What an image's ablation curves cost in batches, as a ratio to running their settings one by one; and memory over many images.

    python benchmarks/ablation.py                     the pocket model: 9 numbers of neurons in 3 arms, with captions
    python benchmarks/ablation.py --memory 500        resident memory over many images, on a tiny model

Both ways are timed in one process, in turns, on the same image. One by one is what a user would write: for each setting
`with ablate(...)`, the probability, and the caption. A second ratio is to a loop that encodes the image only once and takes
the point without ablation only once.
"""

import argparse, json, statistics, time

import pandas as pd, psutil, torch

from mmneurons.ablation import ablate, ablation_curve, paper_arms, paper_ks, target_probability
from mmneurons.activations import default_baseline
from mmneurons.attribution import attribute, attribute_all, top_neurons
from mmneurons.data import gallery
from mmneurons.model import MultimodalLM, tiny_model


def ways(mm, image, attribution, arms, ks):
    "The same curves three times: in batches, one by one, one by one with the image encoded once"

    value = default_baseline(mm).mean

    def batched():
        return ablation_curve(mm, [image], [attribution], arms, ks, value)

    def loop(once=False):
        rows, seen, intact = [], mm.see(image, False), None
        for arm, neurons in arms.items():
            for k in ks:
                if once and not k and intact:
                    rows.append((arm, k, *intact))
                    continue
                with ablate(mm, neurons.head(k), value):
                    prompt = (seen if once else mm.see(image, False)).soft_prompt
                    p = target_probability(mm, prompt, attribution).item()
                    text = mm.caption(seen if once else image)
                if not k:
                    intact = p, text
                rows.append((arm, k, p, text))
        return pd.DataFrame(rows, columns=['arm', 'n_ablated', 'p_target', 'caption'])

    return dict(batched=batched, one_by_one=loop, encoded_once=lambda: loop(True))


def speed(args):
    "Median seconds of each way over the images, the ratios, and whether they agree"
    mm, took, off, same = (
        MultimodalLM.from_pretrained(
            args.model, device=args.device, dtype=getattr(torch, args.dtype)
        ),
        {},
        0,
        [],
    )
    for n, ex in enumerate(list(gallery())[: args.n + 1]):  # the first one warms up
        a = attribute(mm, ex.image, image_id=ex.image_id)
        top = top_neurons(a, paper_ks(mm)[-1])
        arms = paper_arms(mm, top, top_neurons(a, 2 * len(top))[::2], seeds=(0,))
        arms['random'] = arms['random'][0]
        found = {}
        for name, way in ways(mm, ex.image, a, arms, paper_ks(mm)).items():
            start = time.perf_counter()
            found[name] = way()
            if n:
                took.setdefault(name, []).append(time.perf_counter() - start)
        off = max(off, (found['batched'].p_target - found['one_by_one'].p_target).abs().max())
        same += (found['batched'].caption == found['one_by_one'].caption).tolist()
    seconds = {k: statistics.median(v) for k, v in took.items()}
    return dict(
        settings=len(found['batched']),
        images=args.n,
        **{k: round(v, 2) for k, v in seconds.items()},
        ratio=round(seconds['batched'] / seconds['one_by_one'], 3),
        ratio_encoded_once=round(seconds['batched'] / seconds['encoded_once'], 3),
        largest_difference_of_p=float(off),
        same_captions=sum(same) / len(same),
    )


def memory(args):
    "Resident MB after some of the images; `ablation_curve` gets an iterator and never holds more than one"
    mm, images, seen = tiny_model(), [ex.image for ex in gallery()], {}
    found = list(attribute_all(mm, images, 'dog', captions=['a dog'] * len(images)))

    def stream():
        for i in range(args.memory):
            if i in (50, args.memory // 2, args.memory - 1):
                seen[i] = round(psutil.Process().memory_info().rss / 2**20)
            yield images[i % len(images)]

    ablation_curve(
        mm,
        stream(),
        (found[i % len(found)] for i in range(args.memory)),
        lambda a: paper_arms(mm, top_neurons(a, 30), k=30),
        (0, 10, 30),
    )
    return seen


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--model', default='pocket')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', choices=['float32', 'bfloat16'], default='float32')
    parser.add_argument(
        '-n', type=int, default=3, help='images of the gallery, after one to warm up'
    )
    parser.add_argument('--memory', type=int, default=0, metavar='IMAGES')
    args = parser.parse_args()
    print(json.dumps(memory(args) if args.memory else speed(args)))
