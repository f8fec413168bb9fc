"Multimodal models of transformers at tiny size: each image vector is at its place, or the model is refused by name."

import numpy as np, pytest, torch
import transformers as tr
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn

from mmneurons.ablation import ablate
from mmneurons.activations import Baseline, neuron_activations
from mmneurons.attribution import attribute, top_neurons
from mmneurons.encoders import check_encoder
from mmneurons.families import check_family
from mmneurons.images import open_image
from mmneurons.model import MultimodalLM, tiny_model
from mmneurons.receptive_fields import heatmap, receptive_field
from mmneurons.report import as_text, described, look
from mmneurons.vlm import _TEXT as TEXT, _VISION as VISION, _WORDS as WORDS
from mmneurons.vlm import VlmLM, tiny_vlm

MARKS = WORDS[2:7]
SMALL = {k: v for k, v in VISION.items() if k not in ('patch_size', 'image_size')}
ROPE = dict(rope_type='default', mrope_section=[2, 3, 3], rope_theta=1e4)
TILES = [[32, 64], [64, 32], [64, 64]]
IMAGE = Image.fromarray(np.random.default_rng(7).integers(0, 256, (60, 90, 3), dtype=np.uint8))


def tokenizer(more=(), **special):
    "One token for each word, and for the marks that a processor asks for"
    words = [*WORDS, *more]
    tok = tr.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, '.')),
        bos_token='<bos>',
        eos_token='<eos>',
        pad_token='<eos>',
        extra_special_tokens=special,
    )
    marks = [tr.AddedToken(w, special=True, normalized=False) for w in [*MARKS, *more]]
    tok.add_tokens(marks, special_tokens=True)
    tok.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    return tok


def text(more=0, **settings):
    return TEXT | dict(vocab_size=len(WORDS) + more) | settings


def vision(side=32):
    return VISION | dict(image_size=side)


def square(side):
    return dict(height=side, width=side)


def gemma3():
    config = tr.Gemma3Config(
        text_config=text(sliding_window=8, query_pre_attn_scalar=16),
        vision_config=vision(64),
        image_token_index=4,
        boi_token_index=3,
        eoi_token_index=5,
        mm_tokens_per_image=16,
    )
    names = dict(image_token=MARKS[2], boi_token=MARKS[1], eoi_token=MARKS[3])
    images = tr.Gemma3ImageProcessor(size=square(64))
    processor = tr.Gemma3Processor(images, tokenizer(**names), image_seq_length=16)
    return tr.Gemma3ForConditionalGeneration(config), processor, f'{MARKS[1]} A picture of', None


IDEFICS_MARKS = ['<fake_token_around_image>', '<end_of_utterance>', '<row>', '<global-img>', '\n']
IDEFICS_MARKS += [f'<row_{r}_col_{c}>' for r in (1, 2) for c in (1, 2)]


def idefics2():
    config = tr.Idefics2Config(
        text_config=tr.MistralConfig(**text(9)),
        vision_config=vision(64),
        perceiver_config=dict(
            resampler_n_latents=64,
            resampler_depth=1,
            resampler_n_heads=2,
            num_key_value_heads=1,
            resampler_head_dim=16,
            hidden_size=32,
        ),
        image_token_id=2,
    )
    size = dict(shortest_edge=64, longest_edge=64)
    images = tr.Idefics2ImageProcessor(size=size, do_image_splitting=False)
    processor = tr.Idefics2Processor(images, tokenizer(IDEFICS_MARKS), image_seq_len=64)
    return tr.Idefics2ForConditionalGeneration(config), processor, '<image> A picture of', None


def idefics3(split):
    config = tr.Idefics3Config(
        text_config=tr.LlamaConfig(**text(9)),
        vision_config=vision(64),
        image_token_id=2,
        scale_factor=2,
    )
    images = tr.Idefics3ImageProcessor(
        size=dict(longest_edge=128 if split else 64),
        max_image_size=dict(longest_edge=64),
        do_image_splitting=split,
    )
    processor = tr.Idefics3Processor(images, tokenizer(IDEFICS_MARKS), image_seq_len=16)
    return tr.Idefics3ForConditionalGeneration(config), processor, '<image> A picture of', None


def internvl():
    config = tr.InternVLConfig(
        text_config=tr.Qwen2Config(**text()),
        vision_config=tr.InternVLVisionConfig(**SMALL, patch_size=[8, 8], image_size=[64, 64]),
        image_token_id=4,
        downsample_ratio=0.5,
    )
    names = dict(start_image_token=MARKS[1], end_image_token=MARKS[3])
    names |= dict(context_image_token=MARKS[2], video_token=MARKS[4])
    processor = tr.InternVLProcessor(
        tr.GotOcr2ImageProcessor(size=square(64), min_patches=4),
        tokenizer(**names),
        tr.InternVLVideoProcessor(),
        image_seq_length=16,
    )
    prompt = f'{MARKS[2]} A picture of'
    return tr.InternVLForConditionalGeneration(config), processor, prompt, None


def llava_next():
    config = tr.LlavaNextConfig(
        text_config=tr.LlamaConfig(**text()),
        vision_config=tr.CLIPVisionConfig(**vision()),
        image_token_index=2,
        vision_feature_layer=-1,
        image_grid_pinpoints=TILES,
    )
    images = tr.LlavaNextImageProcessor(
        size=dict(shortest_edge=32), crop_size=square(32), image_grid_pinpoints=TILES
    )
    processor = tr.LlavaNextProcessor(
        images, tokenizer(), 8, 'default', num_additional_image_tokens=1
    )
    prompt = '<bos> <image> A picture of'
    return tr.LlavaNextForConditionalGeneration(config), processor, prompt, None


def onevision(size=None):
    tiles = [[32, 32], *TILES]
    config = tr.LlavaOnevisionConfig(
        text_config=tr.Qwen2Config(**text()),
        vision_config=tr.SiglipVisionConfig(**vision()),
        image_token_index=2,
        vision_feature_layer=-1,
        image_grid_pinpoints=tiles,
    )
    processor = tr.LlavaOnevisionProcessor(
        tr.LlavaOnevisionImageProcessor(size=square(32), image_grid_pinpoints=tiles),
        tokenizer(),
        tr.LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy='full',
    )
    prompt = '<bos> <image> A picture of'
    return tr.LlavaOnevisionForConditionalGeneration(config), processor, prompt, size


def qwen(model, config, processor, **vision):
    config = config(
        text_config=text(rope_parameters=ROPE),
        vision_config=vision
        | dict(depth=2, hidden_size=32, num_heads=2, patch_size=8, out_hidden_size=32)
        | dict(intermediate_size=48),
        image_token_id=4,
        vision_start_token_id=3,
        vision_end_token_id=5,
        video_token_id=6,
    )
    images = tr.Qwen2VLImageProcessor(patch_size=8, merge_size=2, min_pixels=256, max_pixels=10**6)
    prompt = f'{" ".join(MARKS[1:4])} A picture of'
    processor = processor(images, tokenizer(), tr.Qwen2VLVideoProcessor())
    return model(config), processor, prompt, (96, 80)


def qwen2_5_vl():
    parts = tr.Qwen2_5_VLForConditionalGeneration, tr.Qwen2_5_VLConfig, tr.Qwen2_5_VLProcessor
    return qwen(*parts, window_size=32, fullatt_block_indexes=[1])


def qwen3_vl():
    parts = tr.Qwen3VLForConditionalGeneration, tr.Qwen3VLConfig, tr.Qwen3VLProcessor
    return qwen(*parts, deepstack_visual_indexes=[0], num_position_embeddings=64)


def mistral3():
    config = tr.Mistral3Config(
        text_config=tr.MistralConfig(**text(2)),
        vision_config=tr.PixtralVisionConfig(**vision(64) | dict(hidden_size=32)),
        image_token_index=2,
        vision_feature_layer=-1,
        spatial_merge_size=2,
    )
    processor = tr.PixtralProcessor(
        tr.PixtralImageProcessor(size=dict(longest_edge=64), patch_size=8),
        tokenizer(['[IMG_BREAK]', '[IMG_END]']),
        patch_size=8,
        spatial_merge_size=2,
        image_token='<image>',
    )
    return tr.Mistral3ForConditionalGeneration(config), processor, '<image> A picture of', None


def kosmos2():
    text = dict(vocab_size=40, embed_dim=32, layers=2, ffn_dim=64, attention_heads=2)
    config = tr.Kosmos2Config(text_config=text, vision_config=vision(), latent_query_num=16)
    return tr.Kosmos2ForConditionalGeneration(config), tokenizer(), '<image>', None


def tiny(make, *args):
    "Model, processor, prompt and image size, with random weights"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, *rest = make(*args)
        for p in model.parameters():
            nn.init.normal_(p, std=0.1)
    return model.eval(), *rest


SUPPORTED = {  # name: how to make it, its grid, all vectors of an image, the first and the last in the grid
    'gemma3': ((gemma3,), (4, 4), 16, (0, 15)),
    'idefics3': ((idefics3, False), (4, 4), 16, (0, 15)),
    'idefics3 in tiles': ((idefics3, True), (4, 4), 91, (75, 90)),
    'internvl': ((internvl,), (4, 4), 80, (64, 79)),
    'llava_next': ((llava_next,), (4, 4), 36, (0, 15)),
    'llava_onevision': ((onevision,), (4, 4), 36, (0, 15)),
    'llava_onevision, wide': ((onevision, (32, 64)), (4, 4), 52, (0, 15)),
    'qwen2_5_vl': ((qwen2_5_vl,), (6, 5), 30, (0, 29)),
    'mistral3': ((mistral3,), (4, 4), 19, (0, 18)),
}


@pytest.fixture(scope='module', params=SUPPORTED)
def case(request):
    how, *about = SUPPORTED[request.param]
    model, *rest = tiny(*how)
    return model, MultimodalLM.from_vlm(model, *rest), *about


def test_the_layout_is_known(case):
    _, mm, grid, n, ends = case
    cells = mm.encoder.layout.flatten()
    assert (mm.grid, mm.n_patches, mm.soft_prompt([IMAGE]).shape) == (grid, n, (1, n, 32))
    assert (cells[0], cells[-1], len(set(cells.tolist()))) == (*ends, grid[0] * grid[1])


def test_an_edited_patch_changes_the_vector_that_the_layout_names(case):
    _, mm, (rows, columns), *_ = case
    h, w = mm.encoder.spec.image_size
    dark, light = np.random.default_rng(1).integers(0, 256, (2, 4, h, w, 3), dtype=np.uint8)
    before = mm.patches([*map(Image.fromarray, dark)])
    for r, c in np.ndindex(rows, columns):
        edited = dark.copy()
        here = np.s_[
            :, r * h // rows : (r + 1) * h // rows, c * w // columns : (c + 1) * w // columns
        ]
        edited[here] = light[here]
        change = (mm.patches([*map(Image.fromarray, edited)]) - before).norm(dim=-1).mean(0)
        found = change[mm.encoder.layout.flatten()].argmax()
        assert divmod(found.item(), columns) == (r, c)


def test_the_model_captions_as_the_plain_one(case):
    model, mm, *_ = case
    inputs = mm.encoder.pixels([IMAGE])
    length, options = inputs['input_ids'].shape[1], dict(max_new_tokens=6, do_sample=False)
    plain = model.generate(**inputs, **options, eos_token_id=sorted(mm.ends))[0, length:].tolist()
    soft_prompt = mm.soft_prompt([IMAGE, Image.new('RGB', (9, 9))])
    assert mm.caption_ids(soft_prompt, 6)[0] == mm.trim(plain)
    with torch.no_grad():
        torch.testing.assert_close(mm(mm.embed(soft_prompt[:1])), model(**inputs).logits[:, -1])


def test_its_neurons_are_proved(case):
    _, mm, *_ = case
    x = mm.embed(mm.soft_prompt([IMAGE, Image.new('RGB', (9, 9))]))
    assert (check_family(mm, x=x) < 0.01).all()


def test_maps_show_the_cells_of_the_layout(case):
    _, mm, grid, *_ = case
    top = top_neurons(attribute(mm, IMAGE, 'dog'), 5)
    plain = neuron_activations(mm, IMAGE, top)
    assert plain.shape == (5, mm.n_patches)
    heat = heatmap(mm, IMAGE, top, 'none', mm.grid)
    np.testing.assert_allclose(heat, plain[:, mm.encoder.layout], rtol=1e-5)
    assert receptive_field(mm, IMAGE, top, baseline='none').shape == (5, 60, 90)
    for row in described(mm, top).itertuples():
        cell = [*map(tuple, (mm.encoder.layout == row.patch).nonzero().tolist())]
        assert cell == ([(row.row, row.column)] if row.row == row.row else [])


def test_look_and_ablation(case):
    _, mm, *_ = case
    baseline = Baseline.over(mm, [IMAGE, Image.new('RGB', (9, 9), 'red')])
    found = look(mm, IMAGE, 'dog', baseline=baseline)
    assert found.heat.shape[1:] == mm.grid and 'What carried "dog"' in as_text(found)
    assert np.isfinite(found.heat).all() and len(found.ablation)
    x = mm.embed(mm.soft_prompt([IMAGE]))
    with torch.no_grad(), ablate(mm, found.block('carried')):
        ablated = mm(x)
    with torch.no_grad():
        assert not torch.equal(ablated, mm(x))


@pytest.mark.parametrize(
    'make, said',
    [
        (idefics2, 'idefics2 hands its language model 64 vectors that belong to no place'),
        (qwen3_vl, 'qwen3_vl hands images to its language model in a second way'),
        (kosmos2, 'kosmos-2 has no vision_config or no image_token_id'),
    ],
)
def test_what_has_no_place_is_refused_by_name(make, said):
    with pytest.raises(ValueError, match=said) as e:
        MultimodalLM.from_vlm(*tiny(make))
    assert '\n' not in str(e.value)


def test_a_wrong_layout_is_found():
    "All 36 vectors of LLaVA-NeXT as one grid of 6 × 6, as their number suggests; and a tile that is turned"
    mm = MultimodalLM.from_vlm(*tiny(llava_next))
    right = mm.encoder.layout
    assert not check_encoder(mm.encoder)
    for wrong in (torch.arange(36).view(6, 6), right.T, right.flip(0), right + 16):
        mm.encoder.layout = wrong
        assert len(check_encoder(mm.encoder, within=1)) >= 2


def test_vectors_that_are_not_exchanged_are_noticed(monkeypatch):
    "A language model that reads the blank image whatever it is handed"
    model, *rest = tiny_vlm('llava')
    monkeypatch.setattr(VlmLM, 'forward', lambda self, inputs_embeds, **more: model(**self.blank))
    with pytest.raises(ValueError, match='in a second way'):
        MultimodalLM.from_vlm(model, *rest)


def pictures():
    "What PIL opens without being asked what it means: 16 bits, transparency, EXIF, floating point, four inks"
    grey = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (48, 1))
    clear = np.zeros((48, 64, 4), np.uint8)
    clear[10:30, 10:30] = 255, 0, 0, 255
    colour, turned = Image.fromarray(np.dstack([grey, grey, 255 - grey])), Image.Exif()
    turned[0x112] = 6
    yield 'deep.png', Image.fromarray(grey.astype(np.uint16) * 257), {}
    yield 'clear.png', Image.fromarray(clear), {}
    yield 'turned.jpg', colour, dict(exif=turned)
    yield 'float.tiff', Image.fromarray(grey.astype(np.float32) / 255), {}
    yield 'inks.jpg', colour.convert('CMYK'), {}


def test_an_image_that_pil_opened_is_seen_as_its_file_is(tmp_path):
    sees = tiny_model(), MultimodalLM.from_vlm(*tiny_vlm('llava'))
    for name, image, options in pictures():
        image.save(tmp_path / name, **options)
        for mm in sees:
            with Image.open(tmp_path / name) as by_hand:
                got = mm.soft_prompt([by_hand])
            assert torch.equal(got, mm.soft_prompt([open_image(tmp_path / name)])), name
        for encoder in (mm.encoder for mm in sees):
            with Image.open(tmp_path / name) as by_hand:
                got = encoder(encoder.pixels([by_hand]))
            want = encoder(encoder.pixels([open_image(tmp_path / name)]))
            assert torch.equal(got, want), name


def test_a_baseline_of_one_way_to_cut_images_is_refused_for_another():
    whole, cut = (MultimodalLM.from_vlm(*tiny(idefics3, split)) for split in (False, True))
    assert all(torch.equal(*pair) for pair in zip(whole.lm.parameters(), cut.lm.parameters()))
    with pytest.raises(ValueError, match='was made with the pair'):
        Baseline.over(whole, [IMAGE]).check(cut)
