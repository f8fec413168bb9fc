"Weights as they are really made: by processes that are killed or start together, and from missing or damaged pieces."

import hashlib, os, signal, subprocess, sys, time
import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer
from mmneurons.weights import WEIGHTS, Weights, lm_folder

NAME = 'gemma3-270m'
CONVERT = f'from mmneurons.weights import lm_folder; print(lm_folder({NAME!r}))'
PACKAGES = [part.split('/')[0] for part in WEIGHTS[NAME].parts]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache, here and in the processes that a test starts"
    monkeypatch.setenv('MMNEURONS_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


def start(code, **env):
    return subprocess.Popen(
        [sys.executable, '-c', code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | env,
    )


def scratch(cache):
    return list(cache.glob(f'.{NAME}-*'))


def test_a_killed_conversion_leaves_nothing_behind_and_two_at_once_make_one_folder(cache):
    victim = start(CONVERT)
    while not any(any(folder.iterdir()) for folder in scratch(cache)):
        assert victim.poll() is None, victim.communicate()[1]
        time.sleep(0.02)
    victim.kill()
    assert victim.wait() == -signal.SIGKILL
    victim.communicate()
    abandoned, final = scratch(cache), cache / NAME
    assert len(abandoned) == 1 and not final.exists()

    pair = [start(CONVERT), start(CONVERT)]
    answers = [process.communicate() for process in pair]
    assert [process.returncode for process in pair] == [0, 0], answers
    assert [out.split() for out, _ in answers] == [[str(final)]] * 2
    assert sum('preparing the weights' in err for _, err in answers) == 1  # the other one waited
    assert {path.name for path in cache.iterdir()} == {
        NAME,
        f'{NAME}.lock',
    }  # and the abandoned folder is gone

    config, tokenizer = AutoConfig.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert (
        tokenizer.decode(tokenizer('A picture of', add_special_tokens=False).input_ids)
        == 'A picture of'
    )
    with safe_open(final / 'model.safetensors', 'pt') as tensors:
        assert tensors.get_slice('model.embed_tokens.weight').get_shape() == [
            config.vocab_size,
            config.hidden_size,
        ]


def test_without_the_packages_and_the_hub_one_sentence_says_what_to_install(cache, tmp_path):
    hide = f'import sys; sys.modules |= dict.fromkeys({PACKAGES!r}); '
    process = start(hide + CONVERT, HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path / 'hub'))
    _, err = process.communicate()
    error = err.strip().splitlines()[-1]
    assert process.returncode and err.count('Traceback') == 1
    assert error.startswith('FileNotFoundError: ') and error.endswith(
        "pip install 'mmneurons[pocket]'"
    )
    assert [path.name for path in cache.iterdir()] == [f'{NAME}.lock']


def test_one_flipped_byte_is_found_before_anything_is_made(cache, tmp_path, monkeypatch):
    package, good = tmp_path / 'site' / 'flipped_weights', bytes(range(256)) * 64
    package.mkdir(parents=True)
    bad = good[:9000] + bytes([good[9000] ^ 1]) + good[9001:]
    for i in range(4):
        (package / f'lm.gguf.part{i}').write_bytes(bad[i * 4096 : (i + 1) * 4096])
    monkeypatch.syspath_prepend(package.parent)
    sums = [hashlib.sha256(data).hexdigest() for data in (good, bad)]
    parts = tuple(f'{package.name}/lm.gguf.part{i}' for i in range(4))
    monkeypatch.setitem(
        WEIGHTS, 'flipped', Weights('lm.gguf', sums[0], parts, 'flipped-weights', 'none')
    )
    with pytest.raises(ValueError) as e:
        lm_folder('flipped')
    assert all(what in str(e.value) for what in ['lm.gguf', *sums]) and '\n' not in str(e.value)
    assert [path.name for path in cache.iterdir()] == ['flipped.lock']
