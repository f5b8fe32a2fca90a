"""Judges' weights in the formats of the hub, tiny and random: from a tensor's name in the reference's checkpoint come the
same numbers on every machine, so that the references' own code could be run on them (golden/*.json)."""
import json
import os
import zlib

import numpy as np
import torch

from toy import make
from toy import world as toy

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")


def golden(name):
    with open(os.path.join(HERE, name)) as f:
        return json.load(f)


def normal(name, shape):
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))


def fill(name, shape):
    x = normal(name, shape)
    if name.endswith("logit_scale"):
        x = np.log(100.0) + 0 * x
    elif len(shape) <= 1:
        x = (1 + 0.1 * x) if name.endswith(".weight") else 0.1 * x
    else:
        x = x / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(x, dtype=np.float32).reshape(tuple(shape)).copy())


def noise(name, shape):
    return torch.from_numpy(normal(name, shape).astype(np.float32))


def ids(name, shape, high, low=4):
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).randint(low, high, tuple(shape)).astype(np.int64))


def alexnet_files(folder):
    """alexnet-owt-7be5be79.pth as torchvision has it (the classifier cut short), alex.pth as the lpips package has it."""
    channels, kernels = (3, 64, 192, 384, 256, 256), (11, 5, 3, 3, 3)
    trunk = {"classifier.1.weight": torch.zeros(2, 2)}
    inputs = (3, 64, 192, 384, 256)
    for i, n, o, k in zip((0, 3, 6, 8, 10), inputs, channels[1:], kernels):
        trunk |= {f"features.{i}.{w}": fill(f"features.{i}.{w}", s) for w, s in (("weight", (o, n, k, k)), ("bias", (o,)))}
    torch.save(trunk, os.path.join(folder, "alexnet-owt-7be5be79.pth"))
    names = [f"lin{k}.model.1.weight" for k in range(5)]
    torch.save({n: fill(n, (1, c, 1, 1)).abs() for n, c in zip(names, channels[1:])}, os.path.join(folder, "alex.pth"))


def head_state(width, prefix):
    sizes = [width, 1024, 128, 64, 16, 1]
    return {f"{prefix}{i}.{w}": fill(f"mlp.layers.{i}.{w}", s) for i, n, o in zip((0, 2, 4, 6, 7), sizes, sizes[1:])
            for w, s in (("weight", (o, n)), ("bias", (o,)))}


def tiny_clip(folder, seed=0, act="gelu"):
    """A CLIPModel folder, safetensors, with the toy's tokenizer. Returns the model."""
    from transformers import CLIPConfig, CLIPModel
    words = make.tokenizer()
    torch.manual_seed(seed)
    text = dict(vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, hidden_act=act,
                max_position_embeddings=16, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, hidden_act=act)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=.2) if p.ndim > 1 else None
    model.save_pretrained(folder, safe_serialization=True)
    words.save_pretrained(folder)
    return model


def to_open_clip(clip):
    """A CLIPModel's weights under open_clip's names: written here the other way round than in judges.py, by hand."""
    s = {k: v.detach().clone() for k, v in clip.state_dict().items()}
    out = {"logit_scale": s["logit_scale"], "text_projection": s["text_projection.weight"].T, "visual.proj": s["visual_projection.weight"].T,
           "token_embedding.weight": s["text_model.embeddings.token_embedding.weight"],
           "positional_embedding": s["text_model.embeddings.position_embedding.weight"],
           "visual.class_embedding": s["vision_model.embeddings.class_embedding"],
           "visual.positional_embedding": s["vision_model.embeddings.position_embedding.weight"],
           "visual.conv1.weight": s["vision_model.embeddings.patch_embedding.weight"]}
    for w in ("weight", "bias"):
        out |= {f"ln_final.{w}": s[f"text_model.final_layer_norm.{w}"], f"visual.ln_pre.{w}": s[f"vision_model.pre_layrnorm.{w}"],
                f"visual.ln_post.{w}": s[f"vision_model.post_layernorm.{w}"]}
        for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
            for i in range(2):
                a, b = f"{tower}.encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
                out[f"{b}attn.in_proj_{w}"] = torch.cat([s[f"{a}self_attn.{x}_proj.{w}"] for x in "qkv"])
                for mine, theirs in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                                     ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
                    out[f"{b}{theirs}.{w}"] = s[f"{a}{mine}.{w}"]
    return {k: v.contiguous() for k, v in out.items()}


def step_aware_state(clip, plain=False):
    """The public checkpoint's names: a CLIPModel's, and the time conditioning's. plain: gates 1, shifts and scales 0."""
    H = clip.config.vision_config.hidden_size
    state = {f"model.{k}": v.detach().clone() for k, v in clip.state_dict().items()} | {"model.text_model.embeddings.position_ids": torch.arange(16)[None]}
    for name, n in (*((f"vision_model.encoder.layers.{i}.", 6) for i in range(clip.config.vision_config.num_hidden_layers)), ("vision_model.", 2)):
        key = f"model.{name}adaLN_modulation.1."
        gates = torch.tensor([0., 0., 1., 0., 0., 1.] if n == 6 else [0., 0.]).repeat_interleave(H)
        state |= {key + "weight": torch.zeros(n * H, H), key + "bias": gates} if plain else {
            key + "weight": fill(key + "weight", (n * H, H)), key + "bias": gates + fill(key + "bias", (n * H,))}
    for i, width in ((0, 256), (2, H)):
        key = f"model.t_embedder.mlp.{i}."
        state |= {key + "weight": fill(key + "weight", (H, width)), key + "bias": fill(key + "bias", (H,))}
    return state


BLIP = dict(vision=dict(hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=16,
                        hidden_act="gelu", layer_norm_eps=1e-6),
            text=dict(vocab_size=120, hidden_size=24, encoder_hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                      num_attention_heads=4, layer_norm_eps=1e-12, max_position_embeddings=64, hidden_act="gelu"))
EYE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14,
           projection_dim=24, hidden_act="quick_gelu")
T5 = dict(d_model=48, d_kv=8, d_ff=96, num_layers=3, num_decoder_layers=3, num_heads=6, vocab_size=128, relative_attention_num_buckets=32)


def blip_state():
    """ImageReward.pt, tiny: what the package's BLIP_Pretrain class and MLP hold, in their names."""
    w, t, m = 32, 24, 128
    shapes = {"visual_encoder.cls_token": (1, 1, w), "visual_encoder.pos_embed": (1, 5, w), "visual_encoder.patch_embed.proj.weight": (w, 3, 16, 16),
              "visual_encoder.patch_embed.proj.bias": (w,), "vision_proj.weight": (8, w), "vision_proj.bias": (8,), "text_proj.weight": (8, t),
              "text_proj.bias": (8,), "text_encoder.embeddings.word_embeddings.weight": (120, t),
              "text_encoder.embeddings.position_embeddings.weight": (64, t)}
    def linear(name, o, n):
        shapes.update({f"{name}.weight": (o, n), f"{name}.bias": (o,)})
    def norm(name, n):
        shapes.update({f"{name}.weight": (n,), f"{name}.bias": (n,)})
    norm("visual_encoder.norm", w)
    norm("text_encoder.embeddings.LayerNorm", t)
    for i in range(3):
        b = f"visual_encoder.blocks.{i}."
        norm(b + "norm1", w), norm(b + "norm2", w), linear(b + "attn.qkv", 3 * w, w), linear(b + "attn.proj", w, w)
        linear(b + "mlp.fc1", m, w), linear(b + "mlp.fc2", w, m)
        b = f"text_encoder.encoder.layer.{i}."
        for attention, source in (("attention", t), ("crossattention", w)):
            linear(f"{b}{attention}.self.query", t, t), linear(f"{b}{attention}.self.key", t, source), linear(f"{b}{attention}.self.value", t, source)
            linear(f"{b}{attention}.output.dense", t, t), norm(f"{b}{attention}.output.LayerNorm", t)
        linear(b + "intermediate.dense", 48, t), linear(b + "output.dense", t, 48), norm(b + "output.LayerNorm", t)
    state = {f"blip.{k}": fill(f"blip.{k}", s) for k, s in shapes.items()} | head_state(t, "mlp.layers.")
    return state | {"blip.text_encoder.embeddings.position_ids": torch.arange(64)[None]}


def flant5_state():
    """clip-flant5, tiny, in its checkpoint's names."""
    d, inner, ff = 48, 48, 96
    shapes = {"shared.weight": (128, d), "lm_head.weight": (128, d), "mm_projector.0.weight": (d, 32), "mm_projector.0.bias": (d,),
              "mm_projector.2.weight": (d, d), "mm_projector.2.bias": (d,)}
    for part in ("encoder", "decoder"):
        shapes[f"{part}.final_layer_norm.weight"] = (d,)
        shapes[f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 6)
        for i in range(3):
            attentions = [("SelfAttention", 0)] + ([("EncDecAttention", 1)] if part == "decoder" else [])
            for name, j in attentions:
                b = f"{part}.block.{i}.layer.{j}."
                shapes |= {f"{b}{name}.{x}.weight": (inner, d) for x in "qkv"} | {f"{b}{name}.o.weight": (d, inner), f"{b}layer_norm.weight": (d,)}
            b = f"{part}.block.{i}.layer.{len(attentions)}."
            shapes |= {f"{b}DenseReluDense.wi_0.weight": (ff, d), f"{b}DenseReluDense.wi_1.weight": (ff, d),
                       f"{b}DenseReluDense.wo.weight": (d, ff), f"{b}layer_norm.weight": (d,)}
    eye, w = "vision_tower.vision_tower.vision_model.", 32
    shapes |= {f"{eye}embeddings.class_embedding": (w,), f"{eye}embeddings.patch_embedding.weight": (w, 3, 14, 14),
               f"{eye}embeddings.position_embedding.weight": (5, w)}
    pairs = [("pre_layrnorm", w, 0), ("post_layernorm", w, 0)]
    for i in range(3):
        b = f"encoder.layers.{i}."
        pairs += [(f"{b}layer_norm1", w, 0), (f"{b}layer_norm2", w, 0), (f"{b}mlp.fc1", 64, w), (f"{b}mlp.fc2", w, 64)]
        pairs += [(f"{b}self_attn.{x}_proj", w, w) for x in ("q", "k", "v", "out")]
    for name, o, n in pairs:
        shapes |= {f"{eye}{name}.weight": (o, n) if n else (o,), f"{eye}{name}.bias": (o,)}
    return {k: fill(k, s) for k, s in shapes.items()}


def bert_tokenizer(folder):
    from transformers import BertTokenizer
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({w for c in toy.CAPTIONS for w in c.split()}), *"abcdefghijklmnopqrstuvwxyz"]
    BertTokenizer(vocab={w: i for i, w in enumerate(words)}, do_lower_case=True).save_pretrained(folder)


def t5_tokenizer(folder):
    """A SentencePiece-like vocabulary in tokenizer.json, as the hub's, in which "Yes" is one piece."""
    from transformers import T5Tokenizer
    text = "A chat between curious user and an artificial intelligence assistant gives helpful detailed polite answers"
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁Yes", "▁Does", "▁this", "▁figure", "▁show", *sorted({"▁" + w for w in text.split()})]
    pieces += [*sorted({"▁" + w for c in toy.CAPTIONS for w in c.split()} - set(pieces)), *'abcdefghijklmnopqrstuvwxyz".,?:\'']
    T5Tokenizer(vocab=[(p, -float(i > 2) * (1 + i / 50)) for i, p in enumerate(pieces)], extra_ids=0).save_pretrained(folder)
    return len(pieces)


def weights_folder(folder):
    """Everything that --weights DIR may hold, tiny; judges.vit_h, ImageReward.SIZES, VQAScore.VISION must be made to fit."""
    at = lambda name: os.path.join(folder, name)
    for i, name in enumerate(("CLIP-ViT-H-14-laion2B-s32B-b79K", "PickScore_v1", "clip-vit-large-patch14")):
        clip = tiny_clip(at(name), seed=i, act="quick_gelu" if i == 2 else "gelu")
        if i == 1:
            pick = clip
        if i == 0:
            os.makedirs(at("HPSv2"))
            torch.save({"epoch": 1, "name": "x", "state_dict": to_open_clip(clip)}, at("HPSv2/HPS_v2_compressed.pt"))
    os.makedirs(at("Step-Aware_Preference_Models"))
    torch.save(step_aware_state(pick), at("Step-Aware_Preference_Models/sd-v1-5_step-aware_preference_model.bin"))
    torch.save(head_state(8, "layers."), at("sac+logos+ava1-l14-linearMSE.pth"))
    os.makedirs(at("ImageReward"))
    torch.save(blip_state(), at("ImageReward/ImageReward.pt"))
    bert_tokenizer(at("bert-base-uncased"))
    t5_tokenizer(at("flan-t5-xl"))
    os.makedirs(at("clip-flant5-xxl"))
    state = list(flant5_state().items())
    for n, part in enumerate((state[:50], state[50:])):  # two shards, torch files, as on the hub
        torch.save(dict(part), at(f"clip-flant5-xxl/pytorch_model-0000{n + 1}-of-00002.bin"))
    with open(at("clip-flant5-xxl/config.json"), "w") as f:
        json.dump(T5 | {"tie_word_embeddings": False, "model_type": "clip_t5", "mm_hidden_size": 32}, f)
    alexnet_files(folder)
    return folder
