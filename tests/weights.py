"""Judges' weights in the formats of the hub, tiny and random.

From a tensor's name in the reference's checkpoint come the same numbers on every machine, so that
the references' own code could be run on them: golden/*.json holds what it said.
"""

import json
import os
import string
import zlib

import numpy as np
import torch

from toy import make

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")


def golden(name):
    with open(os.path.join(GOLDEN, name)) as file:
        return json.load(file)


# --------------------------------------------------------------------------------------------------
# Numbers from names


def random_state(name):
    return np.random.RandomState(zlib.crc32(name.encode()))


def noise(name, shape):
    return torch.from_numpy(random_state(name).standard_normal(tuple(shape)).astype(np.float32))


def ids(name, shape, high, low=4):
    numbers = random_state(name).randint(low, high, tuple(shape))
    return torch.from_numpy(numbers.astype(np.int64))


def fill(name, shape):
    x = random_state(name).standard_normal(tuple(shape))
    if name.endswith("logit_scale"):
        x = np.log(100.0) + 0 * x
    elif len(shape) <= 1:
        x = 1 + 0.1 * x if name.endswith(".weight") else 0.1 * x
    else:
        x = x / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(x, dtype=np.float32).reshape(tuple(shape)).copy())


def filled(shapes, prefix=""):
    return {name: fill(prefix + name, shape) for name, shape in shapes.items()}


# --------------------------------------------------------------------------------------------------
# Checkpoints


def head_state(width):
    """The linear head of the aesthetic predictor, in its file's names."""
    widths = [width, 1024, 128, 64, 16, 1]
    shapes = {}
    for number, inputs, outputs in zip((0, 2, 4, 6, 7), widths, widths[1:]):
        shapes[f"layers.{number}.weight"] = (outputs, inputs)
        shapes[f"layers.{number}.bias"] = (outputs,)
    return filled(shapes, "mlp.")


def tiny_clip(folder, seed=0, activation="gelu"):
    """A CLIPModel's folder with the toy's tokenizer. Returns the model."""
    from transformers import CLIPConfig, CLIPModel

    words = make.tokenizer()
    torch.manual_seed(seed)
    both = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=activation,
    )
    text = dict(
        vocab_size=len(words),
        max_position_embeddings=16,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    vision = dict(image_size=28, patch_size=14)
    config = CLIPConfig(text_config=both | text, vision_config=both | vision, projection_dim=8)
    model = CLIPModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, safe_serialization=True)
    words.save_pretrained(folder)
    return model


def to_open_clip(clip):
    """A CLIPModel's weights under open_clip's names: by hand, the other way round than the code."""
    theirs = {k: v.detach().clone() for k, v in clip.state_dict().items()}
    state = {
        "logit_scale": theirs["logit_scale"],
        "text_projection": theirs["text_projection.weight"].T,
        "visual.proj": theirs["visual_projection.weight"].T,
    }
    for mine, name in {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
        "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "visual.ln_post.weight": "vision_model.post_layernorm.weight",
        "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    }.items():
        state[mine] = theirs[name]
    parts = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        for i in range(2):
            layer, block = f"{tower}.encoder.layers.{i}", f"{prefix}transformer.resblocks.{i}"
            for kind in ("weight", "bias"):
                projections = [theirs[f"{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                state[f"{block}.attn.in_proj_{kind}"] = torch.cat(projections)
                for mine, name in parts.items():
                    state[f"{block}.{mine}.{kind}"] = theirs[f"{layer}.{name}.{kind}"]
    return {k: v.contiguous() for k, v in state.items()}


def step_aware_state(clip, plain=False):
    """The public checkpoint: a CLIPModel and its time conditioning, all under "model.".

    plain: gates 1, shifts and scales 0, whatever the time.
    """
    width = clip.config.vision_config.hidden_size
    state = {k: v.detach().clone() for k, v in clip.state_dict().items()}
    state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    layers = range(clip.config.vision_config.num_hidden_layers)
    at_rest = {f"vision_model.encoder.layers.{i}.": [0.0, 0, 1, 0, 0, 1] for i in layers}
    at_rest["vision_model."] = [0.0, 0]
    state = {f"model.{k}": v for k, v in state.items()}
    for place, values in at_rest.items():
        weight = f"model.{place}adaLN_modulation.1.weight"
        bias = f"model.{place}adaLN_modulation.1.bias"
        rows = len(values) * width
        state[weight] = torch.zeros(rows, width)
        state[bias] = torch.tensor(values).repeat_interleave(width)
        if not plain:
            state[weight] = fill(weight, (rows, width))
            state[bias] = state[bias] + fill(bias, (rows,))
    shapes = {"0.weight": (width, 256), "0.bias": (width,)}
    shapes |= {"2.weight": (width, width), "2.bias": (width,)}
    return state | filled({f"model.t_embedder.mlp.{k}": v for k, v in shapes.items()})


# The names and shapes of these two are those that the packages' own classes had at these sizes
BLIP = dict(
    vision=dict(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=16,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    ),
    text=dict(
        vocab_size=120,
        hidden_size=24,
        encoder_hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        layer_norm_eps=1e-12,
        max_position_embeddings=64,
        hidden_act="gelu",
    ),
)
FLANT5_VISION = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=28,
    patch_size=14,
    projection_dim=24,
    hidden_act="quick_gelu",
)
T5 = dict(
    d_model=48,
    d_kv=8,
    d_ff=96,
    num_layers=3,
    num_decoder_layers=3,
    num_heads=6,
    vocab_size=128,
    relative_attention_num_buckets=32,
)


def blip_state():
    """ImageReward.pt, with what BLIP's contrastive loss used as well."""
    state = filled(golden("imagereward.json")["tiny_keys"])
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    return state | {
        "blip.vision_proj.weight": torch.ones(8, 32),
        "blip.text_proj.bias": torch.ones(8),
    }


def flant5_state():
    return filled(golden("vqascore.json")["tiny_keys"])


def alexnet_files(folder):
    """alexnet-owt-7be5be79.pth as torchvision has it, alex.pth as the lpips package has it."""
    trunk = {
        "features.0.weight": (64, 3, 11, 11),
        "features.0.bias": (64,),
        "features.3.weight": (192, 64, 5, 5),
        "features.3.bias": (192,),
        "features.6.weight": (384, 192, 3, 3),
        "features.6.bias": (384,),
        "features.8.weight": (256, 384, 3, 3),
        "features.8.bias": (256,),
        "features.10.weight": (256, 256, 3, 3),
        "features.10.bias": (256,),
    }
    state = filled(trunk) | {"classifier.1.weight": torch.zeros(2, 2)}  # cut short: it is not used
    torch.save(state, os.path.join(folder, "alexnet-owt-7be5be79.pth"))
    channels = (64, 192, 384, 256, 256)
    heads = filled({f"lin{k}.model.1.weight": (1, c, 1, 1) for k, c in enumerate(channels)})
    torch.save({k: v.abs() for k, v in heads.items()}, os.path.join(folder, "alex.pth"))


# --------------------------------------------------------------------------------------------------
# Tokenizers


def caption_words():
    return sorted({word for caption in make.CAPTIONS for word in caption.split()})


def bert_tokenizer(folder):
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = special + caption_words() + list(string.ascii_lowercase)
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    BertTokenizer(vocab=vocabulary, do_lower_case=True).save_pretrained(folder)


def t5_tokenizer(folder):
    """As the hub's, a SentencePiece vocabulary in tokenizer.json, in which "Yes" is one piece.

    Every letter of VQAScore's question is a piece, so that no other wording has its ids.
    """
    from transformers import T5Tokenizer

    words = ["Yes", "Does", "this", "figure", "show", *caption_words()]
    letters = string.ascii_letters + "\".,?:'"
    pieces = ["<pad>", "</s>", "<unk>", "▁", *[f"▁{word}" for word in words], *letters]
    pieces = list(dict.fromkeys(pieces))
    scores = [0.0, 0.0, 0.0] + [-1 - i / 50 for i in range(3, len(pieces))]
    tokenizer = T5Tokenizer(vocab=list(zip(pieces, scores)), extra_ids=0)
    tokenizer.save_pretrained(folder)


# --------------------------------------------------------------------------------------------------


def weights_folder(folder):
    """Everything that --weights DIR may hold. conftest's tiny_judges makes the classes fit."""

    def inside(name):
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    clip_h = tiny_clip(inside("CLIP-ViT-H-14-laion2B-s32B-b79K"), seed=0)
    pick = tiny_clip(inside("PickScore_v1"), seed=1)
    tiny_clip(inside("clip-vit-large-patch14"), seed=2, activation="quick_gelu")
    hps = {"epoch": 1, "name": "x", "state_dict": to_open_clip(clip_h)}
    torch.save(hps, inside("HPSv2/HPS_v2_compressed.pt"))
    step_aware = "Step-Aware_Preference_Models/sd-v1-5_step-aware_preference_model.bin"
    torch.save(step_aware_state(pick), inside(step_aware))
    torch.save(head_state(8), inside("sac+logos+ava1-l14-linearMSE.pth"))
    torch.save(blip_state(), inside("ImageReward/ImageReward.pt"))
    bert_tokenizer(inside("bert-base-uncased"))
    t5_tokenizer(inside("flan-t5-xl"))
    # two shards, torch files, as on the hub
    names = list(flant5_state())
    for number, part in ((1, names[:50]), (2, names[50:])):
        shard = {name: tensor for name, tensor in flant5_state().items() if name in part}
        torch.save(shard, inside(f"clip-flant5-xxl/pytorch_model-0000{number}-of-00002.bin"))
    config = T5 | {"tie_word_embeddings": False, "model_type": "clip_t5", "mm_hidden_size": 32}
    with open(inside("clip-flant5-xxl/config.json"), "w") as file:
        json.dump(config, file)
    alexnet_files(folder)
    return folder
