"The same numbers wherever weights are and whatever the caller's defaults are; a device mismatch is found without a GPU."

from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np, pandas as pd, pytest, torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import mmneurons as mn
from mmneurons import methods
from mmneurons.activations import Baseline, unit_activations
from mmneurons.attribution import attribute_words
from mmneurons.data import Example
from mmneurons.hooks import hook_neurons
from mmneurons.model import tiny_model
from mmneurons.overlaps import control_maps
from mmneurons.receptive_fields import field_thresholds
from mmneurons.report import look
from mmneurons.studies.beyond import text_activations, word_probabilities
from mmneurons.studies.circuits import circuit
from mmneurons.studies.fidelity import fidelity
from mmneurons.studies.lenses import jacobian_lens, own_text, tuned_lens
from mmneurons.studies.selectivity import class_means, top_images
from mmneurons.studies.steering import steer
from mmneurons.train import caption_loss, caption_vocab

NOISE = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
IMAGES = [Image.fromarray(pixels) for pixels in NOISE]
TABLE = pd.DataFrame(dict(layer=[0, 1, 1], unit=[3, 7, 9], sign=[1, -1, 1], activation=1.0))
LAST = pd.DataFrame(dict(layer=[1], unit=[9], sign=[1], patch=[5])).iloc[0]
CAPTION = 'a red dog on the beach'
EXAMPLES = [Example(str(n), image, (CAPTION,), ('dog',)) for n, image in enumerate(IMAGES)]


def attributed(mm, **how):
    return mn.attribute(mm, IMAGES[0], 'dog', caption=CAPTION, **how).scores


def ablated(mm, **how):
    with mn.ablate(mm, TABLE, **how):
        return mm(mm.embed(mm.soft_prompt(IMAGES[:1])))


def steered(mm, **how):
    with steer(mm, TABLE, **how):
        return mm(mm.embed(mm.soft_prompt(IMAGES[:1])))


def curve(mm):
    a = mn.attribute(mm, IMAGES[0], 'dog', caption=CAPTION)
    arms = dict(top=mn.top_neurons(a, 5))
    return mn.ablation_curve(mm, IMAGES[:1], [a], arms, (0, 3)).p_target


def looked(mm):
    found = look(mm, IMAGES[0], 'dog')
    return np.append(found.heat.ravel(), found.ablation.p_target)


def loss(mm):
    prompt = mm.soft_prompt(IMAGES[:2])
    vocab = caption_vocab(mm, [CAPTION, 'a cat'])
    return torch.stack(
        [caption_loss(mm, prompt, [CAPTION, 'a boat'], '', v) for v in (None, vocab)]
    )


def words(mm):
    pair = attribute_words(mm, IMAGES[0], ['dog', 'beach'], caption=CAPTION, paper=True)
    return word_probabilities(mm, IMAGES[0], pair, [TABLE])


VERBS = dict(
    captions=lambda mm: np.array([sum(map(ord, c)) for c in mm.captions(IMAGES)]),
    activations=lambda mm: unit_activations(mm, IMAGES[0]),
    baseline=lambda mm: Baseline.over(mm, IMAGES).mean,
    contrast=attributed,
    eq2=partial(attributed, paper=True),
    everywhere=partial(attributed, method='grad_x_act', positions='all'),
    patching=partial(attributed, method=methods.patching),
    integrated=partial(attributed, method=methods.integrated, counterfactual='blur'),
    gradient_free=partial(attributed, method=methods.gradient_free, positions='predicting'),
    exact=partial(attributed, method=methods.exact, neurons=TABLE),
    decode=lambda mm: mn.decode(mm, TABLE).logit,
    heatmap=lambda mm: mn.heatmap(mm, IMAGES[0], TABLE),
    thresholds=lambda mm: field_thresholds(mm, IMAGES, TABLE),
    overlap=lambda mm: control_maps(mm, IMAGES[0])['attention'],
    ablate=ablated,
    ablate_everywhere=partial(ablated, value='zero', positions='all'),
    curve=curve,
    steer=partial(steered, how='add'),
    clamp=steered,
    look=looked,
    fidelity=lambda mm: fidelity(mm, mm.see(IMAGES[0], CAPTION), n_top=4, n_random=4).exact,
    jacobian=lambda mm: jacobian_lens(mm, IMAGES[:1]),
    tuned=lambda mm: tuned_lens(mm, own_text(mm, 4, 8)),
    circuit=lambda mm: circuit(mm, mm.see(IMAGES[0]), LAST, k=2).score,
    classes=lambda mm: class_means(mm, TABLE, EXAMPLES),
    top_images=lambda mm: top_images(mm, TABLE, EXAMPLES, k=1).activation,
    words=words,
    text=lambda mm: text_activations(mm, CAPTION, 'dog'),
    loss=loss,
)


class Elsewhere(torch.Tensor):
    "A tensor that says it is on another device; its numbers are in `here`, on the CPU"

    @staticmethod
    def __new__(cls, here, device):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=device,
            requires_grad=here.requires_grad,
        )

    def __init__(self, here, device):
        self.here = here.detach()

    def __repr__(self):
        return f'Elsewhere({self.here}, {self.device})'

    def tolist(self):
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return on_one_device(func, args, kwargs or {})


INDEXED = {'aten::index', 'aten::index_put', 'aten::index_put_', 'aten::_index_put_impl_'}


def device_of(name, tensors, asked):
    "Where the result of an operation is, or an error where CUDA gives one"
    if asked is not None:
        return torch.device(asked)
    if name == 'aten::copy_' or (name in INDEXED and tensors[0].device.type != 'cpu'):
        return tensors[0].device  # what is copied, and the numbers of rows, may be on the CPU
    found = {t.device for t in tensors if t.ndim} or {t.device for t in tensors}
    if len(found) > 1:
        raise RuntimeError(f'{name}: tensors on {" and ".join(sorted(map(str, found)))}')
    return found.pop() if found else torch.device('cpu')


def on_one_device(func, args, kwargs):
    "Do an operation on the CPU; its result says that it is where the operation's tensors said they were"
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    device = device_of(func._schema.name, tensors, kwargs.get('device'))
    if device.type == 'lazy' and 'device' in kwargs:
        kwargs = kwargs | dict(device=torch.device('cpu'))
    known = {id(t.here): t for t in tensors if isinstance(t, Elsewhere)}
    args, kwargs = tree_map(lambda t: getattr(t, 'here', t), (args, kwargs))
    out = func(*args, **kwargs)
    if device.type != 'lazy':
        return out
    return tree_map(
        lambda t: known.get(id(t), Elsewhere(t, device)) if isinstance(t, torch.Tensor) else t, out
    )


class Rehearsal(TorchDispatchMode):
    "While open, each operation must find its tensors on one device, as on a machine that has several"

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=...)` passes here too
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return on_one_device(func, args, kwargs or {})


def move(module, device):
    "Let all tensors of a module say that they are on `device`; tied ones stay tied"
    moved = {}
    for part in module.modules():
        for tensors in part._parameters, part._buffers:
            for name, t in tensors.items():
                if t is not None and not isinstance(t, Elsewhere):
                    tensors[name] = moved.setdefault(
                        id(t), nn.Parameter(Elsewhere(t, device), False)
                    )


def offloaded(kind, folder):
    "All weights of the language model on the CPU, between passes on no device at all"
    mm = tiny_model(kind)
    cpu_offload(mm.lm, execution_device='cpu')
    return mm


def on_disk(kind, folder):
    "All weights of the language model in files"
    mm = tiny_model(kind)
    disk_offload(mm.lm, folder, execution_device='cpu')
    return mm


def on_two_devices(kind, folder=None):
    "The second block and what follows on another device than the rest, as a device map leaves them"
    mm = tiny_model(kind)
    head, last = mm.lm.get_output_embeddings(), [mm.blocks[1], mm.final_norm()]
    tied = head.weight is mm.lm.get_input_embeddings().weight
    for part in last if tied else [*last, head]:
        move(part, 'lazy:1')
    move(mm, 'lazy:0')
    with Rehearsal():
        for part in [*last, head]:
            place = next(part.parameters()).device
            add_hook_to_module(part, AlignDevicesHook(place))
        add_hook_to_module(mm.lm, AlignDevicesHook('lazy:0', io_same_device=True))
    return mm


@contextmanager
def defaults(dtype=torch.float32, device=None):
    "What a caller's notebook has set"
    torch.set_default_dtype(dtype), torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32), torch.set_default_device(None)


def numbers(verb, mm):
    "What a verb gives, as an array"
    out = VERBS[verb](mm)
    out = getattr(out, 'here', out)
    return out.detach().float().numpy() if torch.is_tensor(out) else np.asarray(out, float)


def plain(kind, folder):
    return tiny_model(kind)


# how the model is made, what is open around each call
CONDITIONS = {
    'float64, no_grad': (plain, lambda: [defaults(torch.float64), torch.no_grad()]),
    'bfloat16, inference_mode': (plain, lambda: [defaults(torch.bfloat16), torch.inference_mode()]),
    'another default device': (plain, lambda: [defaults(device='meta')]),
    'offloaded': (offloaded, lambda: []),
    'on disk': (on_disk, lambda: []),
    'two devices': (on_two_devices, lambda: [Rehearsal()]),
}
KINDS = {name: 'llama' for name in CONDITIONS} | {'offloaded': 'gptj', 'on disk': 'gemma3_text'}


@pytest.fixture(scope='module', params=CONDITIONS)
def case(request, tmp_path_factory):
    "The model under one condition, and a plain one; both measure their own baseline"
    make, contexts = CONDITIONS[request.param]
    kind, folders = KINDS[request.param], [tmp_path_factory.mktemp(name) for name in ('a', 'b')]
    return make(kind, folders[0]), contexts, tiny_model(kind), folders


@pytest.mark.parametrize('verb', VERBS)
def test_the_numbers_are_those_of_the_plain_model(case, verb, monkeypatch):
    mm, contexts, usual, (own, other) = case
    monkeypatch.setenv('MMNEURONS_CACHE', str(other))
    want = numbers(verb, usual)
    monkeypatch.setenv('MMNEURONS_CACHE', str(own))
    with ExitStack() as stack:
        for context in contexts():
            stack.enter_context(context)
        got = numbers(verb, mm)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('kind', ['gemma3_text', 'gptj'])
def test_tied_embeddings_and_ungated_neurons_on_two_devices(kind):
    mm = on_two_devices(kind)
    assert {p.device.index for p in mm.lm.parameters()} == {0, 1}
    with Rehearsal():
        assert mm.caption(IMAGES[0]) == tiny_model(kind).caption(IMAGES[0])
        for verb in ('contrast', 'decode', 'heatmap', 'clamp', 'circuit', 'loss'):
            want = numbers(verb, tiny_model(kind))
            np.testing.assert_allclose(numbers(verb, mm), want, rtol=1e-3, atol=1e-5)


def on_the_cpu(layer, acts):
    return acts * torch.ones(acts.shape[-1])  # a mask that was not moved


def between_layers(found, layer, acts):
    found.append(acts)
    return torch.stack(found).sum(0) if len(found) > 1 else None  # of two devices


def a_table(layer, acts):
    return torch.zeros(3, 64)[acts.argmax(-1)]  # indexed by a tensor of another device


def into_numpy(layer, acts):
    acts.detach().numpy()


@pytest.mark.parametrize(
    'edit, said',
    [
        (on_the_cpu, 'aten::mul: tensors on cpu and lazy:0'),
        (partial(between_layers, []), 'tensors on lazy:0 and lazy:1'),
        (a_table, 'aten::index: tensors on cpu and lazy:0'),
        (into_numpy, 'numpy'),
    ],
)
def test_the_rehearsal_finds_a_planted_mismatch(edit, said):
    mm = on_two_devices('llama')
    with Rehearsal(), pytest.raises(RuntimeError, match=said), hook_neurons(mm, edit):
        mm(mm.embed(mm.soft_prompt(IMAGES[:1])))
    with Rehearsal():
        assert torch.isfinite(mm(mm.embed(mm.soft_prompt(IMAGES[:1]))).here).all()


def test_the_rehearsal_finds_a_mismatch_in_the_backward_pass():
    mm = on_two_devices('llama')

    class Forgets(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, grad):
            return grad * torch.ones(grad.shape)

    with Rehearsal(), pytest.raises(RuntimeError, match='aten::mul: tensors on cpu and lazy:0'):
        x = mm.embed(mm.soft_prompt(IMAGES[:1])).requires_grad_()
        mm(Forgets.apply(x)).sum().backward()
