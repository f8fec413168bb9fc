"Every causal language model that the installed transformers knows: its row is proved, or it is refused by name."

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mmneurons.families import FAMILIES, NeuronLM, check_family, guess_family, refusal, tiny_lm

EXERCISE = 'xglm'  # left out of the table on purpose: a chapter adds its row


def text_config(kind):
    "Configuration of the language model in a model of this type; a bare one where there is no single one"
    try:
        return AutoConfig.for_model(kind).get_text_config()
    except (ValueError, StrictDataclassClassValidationError):
        config = PreTrainedConfig()
        config.model_type = kind
        return config


def verdict(config):
    "What is wrong with how a model type is treated, or None"
    kind = config.model_type
    if kind == EXERCISE:
        return None
    if kind not in FAMILIES:
        return None if refusal(config) else 'neither proved nor refused by name'
    errors = check_family(NeuronLM(tiny_lm(kind)))
    return None if (errors < 0.01).all() else f'not proved: {errors[~(errors < 0.01)].to_dict()}'


def test_each_causal_lm_is_proved_or_refused_by_name():
    configs = {c.model_type: c for c in map(text_config, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}
    wrong = {kind: said for kind, c in configs.items() if (said := verdict(c))}
    assert not wrong, '\n'.join(f'{kind}: {said}' for kind, said in wrong.items())


def test_the_row_that_a_chapter_adds_is_right(monkeypatch):
    lm = tiny_lm(EXERCISE, d_model=32, num_layers=2, attention_heads=2, ffn_dim=64)
    monkeypatch.setitem(FAMILIES, EXERCISE, guess_family(lm))
    assert (check_family(NeuronLM(lm)) < 0.01).all()


@pytest.mark.parametrize('kind', ['olmoe', 'qwen3_moe', 'granitemoe', 'falcon_h1', 'mamba2'])
def test_a_refused_type_is_named_before_it_is_loaded(kind):
    assert repr(kind) in refusal(text_config(kind))


def test_no_row_is_guessed_where_there_is_no_attention():
    with pytest.raises(ValueError, match='have no attention'):
        guess_family(AutoModelForCausalLM.from_config(small_mamba()))


def small_mamba():
    "A configuration of Mamba 2"
    sizes = dict(hidden_size=32, num_heads=4, head_dim=16, n_groups=1, expand=2)
    return AutoConfig.for_model('mamba2', num_hidden_layers=1, vocab_size=21, **sizes)
