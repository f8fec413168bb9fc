"CLIPScore and BERTScore as a sweep measures them, beside a computation of our own: right activation, right image, right captions."

import json
import math
import numpy as np, open_clip, pytest, torch
from PIL import Image
from torch.nn.functional import layer_norm, multi_head_attention_forward
from transformers import BertConfig, BertModel, BertTokenizerFast
from mmneurons import cli
from mmneurons.model import tiny_model
from mmneurons.studies.agreement import load_clip
from mmneurons.sweeps import read_table

COLOURS = dict(red=(200, 40, 40), green=(40, 200, 40), blue=(40, 40, 200))
SAID = ['a dog on a field', 'the cat', 'a horse', 'the boat', 'a dog and a ball']


@pytest.fixture(scope='module')
def clip_file(tmp_path_factory):
    "Random weights of a small architecture, known to open_clip by name"
    folder = tmp_path_factory.mktemp('clip')
    tower = dict(layers=2, width=64)
    config = dict(
        embed_dim=16,
        vision_cfg=dict(tower, image_size=32, patch_size=8, head_width=32),
        text_cfg=dict(tower, context_length=77, vocab_size=49408, heads=2),
    )
    (folder / 'tiny-clip.json').write_text(json.dumps(config))
    open_clip.add_model_config(folder / 'tiny-clip.json')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = open_clip.create_model('tiny-clip').state_dict()
    file = folder / 'weights, random.pt'
    torch.save({name: 3 * w if w.ndim > 1 else w for name, w in state.items()}, file)
    return file


def transformer(x, state, prefix, act, mask):
    "The residual blocks of CLIP, written out: (position, 1, width)"
    for n in range(2):
        p = f'{prefix}transformer.resblocks.{n}.'
        w = {name.removeprefix(p): v for name, v in state.items() if name.startswith(p)}
        h = layer_norm(x, (64,), w['ln_1.weight'], w['ln_1.bias'])
        inside = [w['attn.in_proj_weight'], w['attn.in_proj_bias'], None, None, False, 0.0]
        outside = [w['attn.out_proj.weight'], w['attn.out_proj.bias']]
        x = (
            x
            + multi_head_attention_forward(
                h, h, h, 64, 2, *inside, *outside, training=False, attn_mask=mask
            )[0]
        )
        h = layer_norm(x, (64,), w['ln_2.weight'], w['ln_2.bias'])
        h = act(h @ w['mlp.c_fc.weight'].T + w['mlp.c_fc.bias'])
        x = x + h @ w['mlp.c_proj.weight'].T + w['mlp.c_proj.bias']
    return x


def normed(x, state, name):
    return layer_norm(x, (64,), state[f'{name}.weight'], state[f'{name}.bias'])


@torch.no_grad()
def own_score(state, image, text, act):
    "100 · max(cos, 0) of a square image and a text"
    pixels = torch.tensor(np.array(image.resize((32, 32), Image.BICUBIC)) / 255).float()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    pixels = (pixels - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    cells = pixels.reshape(4, 8, 4, 8, 3).permute(0, 2, 4, 1, 3).reshape(16, -1)
    x = cells @ state['visual.conv1.weight'].reshape(64, -1).T
    x = torch.cat([state['visual.class_embedding'][None], x])
    x = normed(x + state['visual.positional_embedding'], state, 'visual.ln_pre')[:, None]
    x = transformer(x, state, 'visual.', act, None)[0, 0]
    of_image = normed(x, state, 'visual.ln_post') @ state['visual.proj']
    ids = open_clip.get_tokenizer('ViT-B-32')([text])[0]
    x = (state['token_embedding.weight'][ids] + state['positional_embedding'])[:, None]
    x = transformer(x, state, '', act, torch.full((77, 77), -math.inf).triu(1))[ids.argmax(), 0]
    of_text = normed(x, state, 'ln_final') @ state['text_projection']
    return 100 * max(0.0, torch.cosine_similarity(of_image, of_text, dim=0).item())


ACTS = dict(quickgelu=lambda x: x * torch.sigmoid(1.702 * x), gelu=torch.nn.functional.gelu)


@pytest.fixture(scope='module')
def bert_folder(tmp_path_factory):
    "A small BERT with random weights"
    folder = tmp_path_factory.mktemp('bert')
    words = sorted({w for s in SAID for w in s.split()} | {'red', 'of', 'picture'})
    vocab = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *words]
    (folder / 'vocab.txt').write_text('\n'.join(vocab))
    BertTokenizerFast(str(folder / 'vocab.txt')).save_pretrained(folder)
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(vocab), **small)).save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def coco_folder(tmp_path_factory):
    "Three square images in COCO's layout; their captions name other things than their categories"
    folder = tmp_path_factory.mktemp('coco')
    (folder / 'val2017').mkdir(), (folder / 'annotations').mkdir()
    images, captions, marked = [], [], []
    for n, colour in enumerate(COLOURS.values()):
        noise = np.random.default_rng(n).normal(colour, 60, (32, 32, 3)).clip(0, 255)
        Image.fromarray(noise.astype(np.uint8)).save(folder / 'val2017' / f'{n}.png')
        images.append(dict(id=n, file_name=f'{n}.png', width=32, height=32))
        captions += [dict(id=5 * n + i, image_id=n, caption=s) for i, s in enumerate(SAID)]
        square = [[0, 0, 16, 0, 16, 16, 0, 16]]
        marked.append(dict(id=n, image_id=n, category_id=1, iscrowd=0, segmentation=square))
    said = dict(images=images, annotations=captions)
    seen = dict(images=images, annotations=marked, categories=[dict(id=1, name='toaster')])
    for name, found in dict(captions=said, instances=seen).items():
        (folder / 'annotations' / f'{name}_val2017.json').write_text(json.dumps(found))
    return folder


def swept(monkeypatch, coco_folder, out, clip, bert):
    "The tables of a run of the command"
    mm = tiny_model(seed=5)
    monkeypatch.setattr(cli, 'load', lambda args: mm)
    command = ['sweep', '--data', f'coco:{coco_folder}', '--out', str(out), '--k', '5']
    command += ['--tasks', 'attribute,decode,scores', '--reference', '2', '--pool', '8']
    status = cli.main([*command, '--clip', clip, '--bert', str(bert)])
    return status, *((read_table(out, t) for t in ('scores', 'images')) if not status else ())


@pytest.mark.parametrize('act', ACTS)
def test_a_sweep_scores_as_the_paper_does(
    act, monkeypatch, tmp_path, coco_folder, bert_folder, clip_file
):
    clip = f'tiny-clip,{clip_file},{act}'
    status, scores, about = swept(monkeypatch, coco_folder, tmp_path / 'run', clip, bert_folder)
    assert not status and len(about)
    of = scores.set_index(['exhibit', 'arm', 'measure', 'image_id']).value
    state, other = torch.load(clip_file), next(a for a in ACTS if a != act)
    differences = []
    for row in about.itertuples():
        image = Image.open(coco_folder / 'val2017' / f'{row.image_id}.png')
        texts = dict(caption=row.caption.rstrip('.'), nouns='dog field cat horse boat')
        for arm, text in texts.items():  # nouns: of the captions, not the category toaster
            found = of['Table 2', arm, 'CLIPScore', row.image_id]
            assert found == pytest.approx(own_score(state, image, text, ACTS[act]), abs=2e-3)
            differences.append(found - own_score(state, image, text, ACTS[other]))
    assert np.abs(differences).max() > 0.05  # the other activation function would be noticed
    assert of.loc[:, :, 'CLIPScore'].dropna().between(0, 100).all()


def test_bertscore_is_the_mean_over_the_five_captions(
    monkeypatch, tmp_path, coco_folder, bert_folder, clip_file
):
    from bert_score import BERTScorer

    clip = f'tiny-clip,{clip_file},gelu'
    _, scores, about = swept(monkeypatch, coco_folder, tmp_path / 'run', clip, bert_folder)
    of = scores.query('measure == "BERTScore"').set_index(['exhibit', 'arm', 'image_id']).value
    scorer = BERTScorer(model_type=str(bert_folder), num_layers=1)
    scorer._tokenizer.model_max_length = 512
    each = scorer.score(['dog field cat horse boat'] * 5, SAID)[2]
    for name in about.image_id:
        found = of['Table 2', 'nouns', name]
        assert found == pytest.approx(each.mean().item(), abs=1e-5)
        assert found < each.max().item() - 0.01  # which the library takes for several references


@pytest.mark.parametrize(
    'name, said',
    {
        'tiny-clip,{}': 'add ,quickgelu',
        'tiny-clip,{}.lost,gelu': 'is no file',
        'tiny-clop,{},gelu': 'no architecture',
        'RN50,{},gelu': 'open_clip cannot load',
    }.items(),
)
def test_a_wrong_clip_ends_a_run_before_it_begins(
    name, said, monkeypatch, tmp_path, capsys, coco_folder, bert_folder, clip_file
):
    clip = name.format(clip_file)
    (status,) = swept(monkeypatch, coco_folder, tmp_path / 'run', clip, bert_folder)
    assert status == 1 and said in capsys.readouterr().err
    assert not (tmp_path / 'run' / 'images').exists()


def test_a_folder_brings_its_own_activation(tmp_path, clip_file):
    "As published repositories do: a configuration beside the weights"
    config = json.loads((clip_file.parent / 'tiny-clip.json').read_text())
    about = dict(model_cfg=config | dict(quick_gelu=True), preprocess_cfg={})
    (tmp_path / 'open_clip_config.json').write_text(json.dumps(about))
    with pytest.raises(ValueError, match='open_clip cannot load'):  # without weights
        load_clip(f'local-dir:{tmp_path}')
    torch.save(torch.load(clip_file), tmp_path / 'open_clip_pytorch_model.bin')
    clip = load_clip(f'local-dir:{tmp_path}')
    acts = {type(b.mlp.gelu).__name__ for b in clip.model.transformer.resblocks}
    assert acts == {'QuickGELU'}
