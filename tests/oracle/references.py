"""Independent references: transformers' decoders, the released latent layer and pipeline.

Everything here is padded and unfolded, takes weights by released names, and shares no code with
nvembed.py. B texts, T tokens of the longest, D model width, R latents, C cross-attention heads.
"""

import json

import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SENTENCES = (
    "Given a question, retrieve passages that answer the question",
    "How do plants make the food that they need to live? Plants use the light of the sun.",
    "The history of the city begins with the river that runs through the middle of it.",
)
TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 512,
}
FULL = {  # NV-Embed-v2
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---- tiny tokenizer


def tiny_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer.get_vocab_size() == 320
    return tokenizer


# ---- decoders


def randomise(model, seed=0):
    """N(0, 1 / fan-in), norms 1 +- 0.2: every block matters and the states are O(1)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = (1 / parameter.shape[1]) ** 0.5 if parameter.dim() == 2 else 0.2
        parameter.data = noise * scale + (1 if parameter.dim() == 1 else 0)
    return model


def hf_model(family, lm_head=False, seed=0, **changes):
    """transformers' Mistral, Llama, Qwen2 or 3 in fp32 with eager attention and random weights."""
    name = family.capitalize()
    settings = TINY | ({"sliding_window": None} if family == "mistral" else {}) | changes
    settings = {"tie_word_embeddings": False, "attn_implementation": "eager"} | settings
    config = getattr(transformers, f"{name}Config")(**settings)
    kind = f"{name}ForCausalLM" if lm_head else f"{name}Model"
    return randomise(getattr(transformers, kind)(config).eval(), seed)


def bidirectional_mask(lengths, dtype=torch.float32):
    """(B, 1, T, T), added to the scores: 0 for real keys, the most negative number for padding."""
    longest = max(lengths)
    mask = torch.zeros(len(lengths), 1, longest, longest, dtype=dtype)
    for row, length in zip(mask, lengths, strict=True):
        row[..., length:] = torch.finfo(dtype).min
    return mask


def hf_states(model, texts, causal):
    """Lists of ids, padded on the right -> states (B, T, D) of the final norm."""
    lengths = [len(ids) for ids in texts]
    padded = torch.tensor([ids + [0] * (max(lengths) - len(ids)) for ids in texts])
    mask = None if causal else bidirectional_mask(lengths, model.dtype)
    with torch.no_grad():
        return model(input_ids=padded, attention_mask=mask).last_hidden_state


def write_base(folder, tokenizer_json, model):
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json.read_text())


# ---- latent attention


def layer_norm(w, name, x):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def heads_first(x, heads):
    """b n (h d) -> b h n d"""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def latent_layer(w, h, heads=8, lengths=None):
    """h (B, T, D) -> (B, T, D). With `lengths`, keys and values are the text's own ("self")."""
    w = {name.removeprefix("latent_attention_model."): tensor for name, tensor in w.items()}
    block = "cross_attend_blocks.0."
    if lengths is None:
        context = w["latents"].expand(len(h), -1, -1)
        mask = 0.0
    else:
        context = h
        mask = bidirectional_mask(lengths, h.dtype)
    x = layer_norm(w, block + "norm", h)
    context = layer_norm(w, block + "norm_context", context)
    q = heads_first(x @ w[block + "fn.to_q.weight"].T, heads)
    k, v = (context @ w[block + "fn.to_kv.weight"].T).chunk(2, dim=-1)
    k, v = heads_first(k, heads), heads_first(v, heads)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask
    out = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    h = out @ w[block + "fn.to_out.weight"].T + h
    block = "cross_attend_blocks.1."
    x = layer_norm(w, block + "norm", h)
    x, gate = (x @ w[block + "fn.net.0.weight"].T + w[block + "fn.net.0.bias"]).chunk(2, dim=-1)
    gelu = 0.5 * gate * (1 + torch.erf(gate / 2**0.5))
    return (x * gelu) @ w[block + "fn.net.2.weight"].T + w[block + "fn.net.2.bias"] + h


# ---- released folder


def released_shapes(c, latents=512, heads=8):
    """Tensor name -> shape of NV-Embed-v1 and v2 for the text_config `c`."""
    d, f = c["hidden_size"], c["intermediate_size"]
    kv = d // c["num_attention_heads"] * c["num_key_value_heads"]
    shapes = {
        "embedding_model.embed_tokens.weight": (c["vocab_size"], d),
        "embedding_model.norm.weight": (d,),
    }
    for i in range(c["num_hidden_layers"]):
        layer = f"embedding_model.layers.{i}."
        shapes |= {f"{layer}self_attn.{p}_proj.weight": (d, d) for p in "qo"}
        shapes |= {f"{layer}self_attn.{p}_proj.weight": (kv, d) for p in "kv"}
        shapes |= {f"{layer}mlp.{p}_proj.weight": (f, d) for p in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (d, f)}
        shapes |= {f"{layer}{p}_layernorm.weight": (d,) for p in ("input", "post_attention")}
    latent = "latent_attention_model."
    width = heads * d
    shapes[f"{latent}latents"] = (latents, d)
    for norm in ("0.norm", "0.norm_context", "1.norm"):
        shapes |= {f"{latent}cross_attend_blocks.{norm}.{p}": (d,) for p in ("weight", "bias")}
    cross = f"{latent}cross_attend_blocks.0.fn."
    net = f"{latent}cross_attend_blocks.1.fn.net."
    return shapes | {
        f"{cross}to_q.weight": (width, d),
        f"{cross}to_kv.weight": (2 * width, d),
        f"{cross}to_out.weight": (d, width),
        f"{net}0.weight": (8 * d, d),
        f"{net}0.bias": (8 * d,),
        f"{net}2.weight": (d, 4 * d),
        f"{net}2.bias": (d,),
    }


def released_config(text):
    """config.json of NV-Embed-v2, whose latent_attention_config names only its type."""
    decoder = {
        "model_type": "bidir_mistral",
        "architectures": ["MistralModel"],
        "hidden_act": "silu",
        "_name_or_path": "nvidia/NV-Embed-v2",
        "is_decoder": False,
        "torch_dtype": "float32",
    }
    return {
        "model_type": "nvembed",
        "architectures": ["NVEmbedModel"],
        "_name_or_path": "nvidia/NV-Embed-v2",
        "auto_map": {"AutoModel": "modeling_nvembed.NVEmbedModel"},
        "hidden_size": text["hidden_size"],
        "add_eos": True,
        "add_pad_token": True,
        "is_mask_instruction": True,
        "mask_type": "b",
        "latent_attention_config": {"model_type": "latent_attention"},
        "padding_side": "right",
        "text_config": decoder | text,
        "torch_dtype": "float16",
        "transformers_version": "4.42.4",
    }


def random_weights(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        scale = (1 / shape[1]) ** 0.5 if len(shape) == 2 else 0.2
        state[name] = torch.randn(shape, generator=generator) * scale
        state[name] += 1 if name.endswith("norm.weight") or "norm_context.weight" in name else 0
    return state


def write_released(folder, tokenizer_json, shards=1, seed=0, text=None):
    """Writes a tiny model in the released layout -> its weights by released name."""
    text = text or TINY | {"rope_theta": 10000.0, "sliding_window": 4}
    folder.mkdir(parents=True)
    state = random_weights(released_shapes(text), seed)
    (folder / "config.json").write_text(json.dumps(released_config(text)))
    (folder / "tokenizer.json").write_text(tokenizer_json.read_text())
    if shards == 1:
        safetensors.torch.save_file(state, folder / "model.safetensors")
        return state
    where = {}
    for i, name in enumerate(state):
        where[name] = f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
    for file in set(where.values()):
        part = {name: tensor for name, tensor in state.items() if where[name] == file}
        safetensors.torch.save_file(part, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return state


def read_released(folder):
    """All tensors of a released folder by name."""
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= safetensors.torch.load_file(path)
    return state


# ---- released pipeline


def prefix_of(instruction):
    return f"Instruct: {instruction}\nQuery: " if instruction else ""


def released_ids(tokenizer, text, instruction="", max_length=512, bos="<s>", eos="</s>"):
    """The released tokenisation: eos appended as text, bos first, truncated -> ids, masked."""
    ids = [tokenizer.token_to_id(bos)] if bos else []
    prefix = prefix_of(instruction)
    ids += tokenizer.encode(prefix + text + eos, add_special_tokens=False).ids
    return ids[:max_length], len(tokenizer.encode(prefix, add_special_tokens=False).ids)


def released_embed(folder, texts, instruction="", max_length=512):
    """Embeddings (B, D) of a tiny released folder by MistralModel and the references above."""
    state = read_released(folder)
    config = json.loads((folder / "config.json").read_text())
    settings = TINY | {"sliding_window": None, "tie_word_embeddings": False}
    hf_config = transformers.MistralConfig(**settings, attn_implementation="eager")
    decoder = transformers.MistralModel(hf_config).eval()
    prefix = "embedding_model."
    own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    decoder.load_state_dict(own)
    latent = {n: t for n, t in state.items() if n.startswith("latent_attention_model.")}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    pairs = [released_ids(tokenizer, text, instruction, max_length) for text in texts]
    h = latent_layer(latent, hf_states(decoder, [ids for ids, _ in pairs], causal=False))
    pool = torch.zeros(h.shape[:2])
    for row, (ids, masked) in zip(pool, pairs, strict=True):
        row[masked if config["is_mask_instruction"] else 0 : len(ids)] = 1
    return unit((h * pool[..., None]).sum(1) / pool.sum(1, keepdim=True)).numpy()


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)
