"A pair on its way to the hub and back. The hub is a small server on this machine, spoken to by huggingface_hub itself."

import base64, hashlib, json, os, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest, torch
from mmneurons.families import tiny_lm
from mmneurons.model import tiny_model

ROOT = Path(__file__).resolve().parents[1]
LM_CLIENT = """
import sys, torch
from mmneurons.pairs import ModelConfig, lm_config_of, load_lm
pair = ModelConfig('me/lm', 'tiny-beit', lm_revision='float16')
print(lm_config_of(pair).model_type)
lm, tokenizer = load_lm(pair, torch.float32, 'cpu')
print(tokenizer('dog').input_ids, lm.dtype, lm.lm_head.weight.double().sum().item())
"""
CLIENT = """
import sys, tempfile
from mmneurons.model import MultimodalLM, tiny_model
from mmneurons.pairs import ModelConfig
from mmneurons.encoders import Encoder
from mmneurons.families import tiny_lm
from PIL import Image
folder, mm = sys.argv[1], tiny_model('llama')
mm.lm.save_pretrained(folder), mm.tokenizer.save_pretrained(folder)
mm = MultimodalLM(mm.encoder, mm.lm, mm.tokenizer, ModelConfig(folder, 'tiny-beit'))
mm.push_to_hub('me/pair', private=True, steps=3)
again = MultimodalLM.from_pretrained('me/pair', revision='v1')
assert (again.projection.weight - mm.projection.weight).abs().max() < 1e-3
assert again.config.lm == folder and again.grid == mm.grid
print('round trip')
"""


class Hub(BaseHTTPRequestHandler):
    "As much of the hub's interface as one repository of small files needs"

    files, asked = {}, []
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def answer(self, body, status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            'Content-Length': len(body),
            'X-Repo-Commit': 'c' * 40,
            **headers,
        }.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        self.asked.append(self.path)
        if self.path.endswith('/create'):
            return self.answer(
                dict(url='https://huggingface.co/me/pair', name='me/pair', asked=json.loads(body))
            )
        if '/preupload/' in self.path:
            return self.answer(
                dict(
                    files=[
                        f | dict(uploadMode='regular', shouldIgnore=False)
                        for f in json.loads(body)['files']
                    ]
                )
            )
        if '/commit/' not in self.path:
            return self.answer(dict(errors=[], warnings=[]))  # the card is checked
        for line in map(json.loads, body.splitlines()):
            if line['key'] == 'file':
                self.files[line['value']['path']] = base64.b64decode(line['value']['content'])
        self.answer(
            dict(
                commitUrl='https://huggingface.co/me/pair/commit/c',
                commitOid='c' * 40,
                success=True,
            )
        )

    def do_GET(self):
        self.asked.append(self.path)
        if '/tree/' in self.path:
            return self.answer(
                [
                    dict(type='file', path=n, size=len(c), oid=hashlib.sha1(c).hexdigest())
                    for n, c in self.files.items()
                ]
            )
        if self.path.startswith('/api/'):
            return self.answer(
                dict(
                    id='me/pair',
                    sha='c' * 40,
                    siblings=[dict(rfilename=name) for name in self.files],
                    private=True,
                    tags=[],
                )
            )
        content = self.files.get(self.path.split('?')[0].rpartition('/')[2])
        if content is None:
            return self.answer(b'', 404, X_Error_Code='EntryNotFound')
        self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    do_HEAD = do_GET


@pytest.fixture
def hub():
    Hub.files.clear()
    Hub.asked.clear()
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture
def online(hub, tmp_path):
    "The environment of a process whose hub is the small server"
    env = {
        k: v for k, v in os.environ.items() if k not in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE')
    }
    return env | dict(
        HF_ENDPOINT=hub,
        HF_HOME=str(tmp_path / 'home'),
        HF_TOKEN='hf_test',
        PYTHONPATH=str(ROOT),
        HF_HUB_DISABLE_XET='1',
    )


def test_a_pair_is_pushed_and_comes_back_at_its_revision(online, tmp_path):
    done = subprocess.run(
        [sys.executable, '-c', CLIENT, str(tmp_path / 'lm')],
        env=online,
        capture_output=True,
        text=True,
    )
    assert done.stdout == 'round trip\n', done.stderr
    assert set(Hub.files) == {'config.json', 'projection.safetensors', 'README.md'}
    assert any('/revision/v1' in path for path in Hub.asked)
    assert (
        'library_name: mmneurons' in Hub.files['README.md'].decode()
        and '"steps": 3' in Hub.files['README.md'].decode()
    )


def test_of_a_language_model_only_what_is_needed_is_fetched(online, tmp_path):
    "In the layout of GPT-J's half precision: one pytorch_model.bin, and the formats of other libraries beside it"
    lm = tiny_lm('gptj').half()
    lm.config.save_pretrained(tmp_path / 'lm')
    state = lm.state_dict() | {'transformer.h.0.attn.masked_bias': torch.tensor(-1e9)}
    torch.save(state, tmp_path / 'lm' / 'pytorch_model.bin')
    tiny_model('gptj').tokenizer.save_pretrained(tmp_path / 'lm')
    (tmp_path / 'lm' / 'flax_model.msgpack').write_bytes(b'not wanted')
    Hub.files |= {path.name: path.read_bytes() for path in (tmp_path / 'lm').iterdir()}
    command = [sys.executable, '-c', LM_CLIENT]
    done = subprocess.run(command, env=online, capture_output=True, text=True)
    head = lm.lm_head.weight.double().sum().item()
    assert done.stdout == f'gptj\n[9] torch.float32 {head}\n', done.stderr
    assert any(path.endswith('/revision/float16') for path in Hub.asked)
    assert any(path.endswith('pytorch_model.bin') for path in Hub.asked)
    assert not any('msgpack' in path for path in Hub.asked)
    again = online | dict(HF_HUB_OFFLINE='1')
    assert subprocess.run(command, env=again, capture_output=True, text=True).stdout == done.stdout
