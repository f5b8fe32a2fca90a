"""Judges in which a language model reads the prompt while it looks at the image."""

import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.common import UserError
from parts.judges_clip import CLIP_MEAN, at_least_fp32, linear_head, preprocess, renamed, tower
from parts.weights import build, find, load_tokenizer, read_config, read_folder, read_state


class ImageReward:
    """BLIP's text encoder reads the prompt while it looks at the image (Xu et al. 2023).

    A linear head on its [CLS] state is the reward, standardised over the authors' data.
    """

    reads_prompt, unclamped = True, False
    MEAN, STD = 0.16717362830052426, 1.0333394966054072
    # transformers' defaults differ from these in places, without a word
    VISION = dict(image_size=224, patch_size=16, hidden_act="gelu", layer_norm_eps=1e-6)
    TEXT = dict(encoder_hidden_size=1024, hidden_act="gelu", layer_norm_eps=1e-12)
    CONFIG = dict(vision=tower(1024, 24, 16, **VISION), text=tower(768, 12, 12, **TEXT))
    NAMES = (  # of BLIP's vision tower -> of BlipVisionModel
        (r"^cls_token", "embeddings.class_embedding"),
        (r"^pos_embed", "embeddings.position_embedding"),
        (r"^patch_embed\.proj", "embeddings.patch_embedding"),
        (r"^blocks", "encoder.layers"),
        (r"\.attn\.qkv", ".self_attn.qkv"),
        (r"\.attn\.proj", ".self_attn.projection"),
        (r"\.norm(\d)", r".layer_norm\1"),
        (r"^norm", "post_layernorm"),
    )

    def __init__(self, device="cpu", weights=None, dtype=torch.float32):
        import transformers

        self.device, self.dtype = device, dtype
        self.where = find("THUDM/ImageReward", "ImageReward.pt", weights)
        bert = "google-bert/bert-base-uncased"
        self.tokenizer = load_tokenizer(transformers.BertTokenizer, bert, weights)
        vision, text, head = self.split(read_state(self.where))
        # is_decoder makes cross-attention; forward is not told of it, so attention looks both ways
        text_config = transformers.BlipTextConfig(**self.CONFIG["text"], is_decoder=True)
        vision_config = transformers.BlipVisionConfig(**self.CONFIG["vision"])
        options = self.where, device, dtype
        self.text = build(lambda: transformers.BlipTextModel(text_config, False), text, *options)
        self.vision = build(lambda: transformers.BlipVisionModel(vision_config), vision, *options)
        self.head = build(lambda: linear_head(text_config.hidden_size), head, *options)

    @classmethod
    def split(cls, state):
        """The checkpoint -> those of BlipVisionModel, BlipTextModel and the head."""
        vision, text, head = {}, {}, {}
        for name, value in state.items():
            part, _, rest = name.removeprefix("blip.").partition(".")
            if part == "visual_encoder":
                vision[renamed(rest, cls.NAMES)] = value
            elif part == "text_encoder":
                text[rest] = value
            elif part not in ("vision_proj", "text_proj"):  # of BLIP's contrastive loss, not used
                # the head's, or else of no known name: build() will say so
                head[name.removeprefix("mlp.layers.")] = value
        text.pop("embeddings.position_ids", None)  # 0, 1, 2, ...
        return vision, text, head

    def encode(self, prompts):
        """(P, 2, 35) token ids and their mask: no text is encoded before the image is seen."""
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=35)
        return torch.tensor([tokens.input_ids, tokens.attention_mask]).transpose(0, 1)

    def __call__(self, images, text, t=None):
        pixels = preprocess(images.to(self.device), self.vision.config.image_size)
        return self.reward(pixels, text.to(self.device))

    def reward(self, pixels, text):
        """(N, 3, S, S) preprocessed, (N, 2, L) -> (N,)."""
        seen = self.vision(pixels.to(self.dtype)).last_hidden_state  # (N, 1 + patches, 1024)
        read = self.text(
            input_ids=text[:, 0],
            attention_mask=text[:, 1],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], device=seen.device),
        )
        class_token = read.last_hidden_state[:, 0]
        return (self.head(class_token)[:, 0] - self.MEAN) / self.STD


class VQAScore:
    """'Does this figure show "{prompt}"? Please answer yes or no.' (Lin et al. 2024)

    Patches of the image, through a projector, stand among the words that a FLAN-T5 reads. The score
    is sqrt(P("Yes") P(end | "Yes")), the reference's exp(-mean cross entropy). bf16 on CUDA, as the
    reference (scatter 1e-2). clip-flant5-xl is a quarter of the size: --judges vqascore with a
    --weights folder in which clip-flant5-xxl is that model.
    """

    reads_prompt, unclamped = True, False
    BEFORE = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: "
    )
    AFTER = '\nDoes this figure show "{}"? Please answer yes or no. ASSISTANT: '
    CONFIG = tower(  # of the vision tower; T5's are in config.json
        1024, 24, 16, image_size=336, patch_size=14, projection_dim=768, hidden_act="quick_gelu"
    )
    T5_SIZES = (
        "vocab_size d_model d_kv d_ff num_layers num_decoder_layers num_heads "
        "relative_attention_num_buckets relative_attention_max_distance"
    ).split()

    def __init__(self, device="cpu", weights=None, dtype=None):
        from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel

        on_cuda = str(device).startswith("cuda")
        dtype = dtype or (torch.bfloat16 if on_cuda else torch.float32)
        self.device, self.dtype = device, dtype
        self.where = find("zhiqiulin/clip-flant5-xxl", None, weights)
        self.tokenizer = load_tokenizer(AutoTokenizer, "google/flan-t5-xl", weights)
        self.yes = self.tokenizer("Yes").input_ids
        if len(self.yes) != 2 or self.yes[1] != self.tokenizer.eos_token_id:
            why = f'google/flan-t5-xl reads "Yes" as {self.yes}, not as one token and the end'
            raise UserError(f"the tokenizer of {why}: download it again")
        self.words = len(self.tokenizer)  # 32100 of 32128 logits: the reference cuts off the rest
        t5, vision, projector = self.split(read_folder(self.where))
        self.t5 = self.build_t5(t5)
        vision_config = CLIPVisionConfig(**self.CONFIG)
        options = self.where, device, dtype
        self.vision = build(lambda: CLIPVisionModel(vision_config), vision, *options)
        widths = vision_config.hidden_size, self.t5.config.d_model
        self.projector = build(lambda: two_layers(*widths), projector, *options)

    @staticmethod
    def split(state):
        """The checkpoint -> those of T5ForConditionalGeneration, CLIPVisionModel, the projector."""
        t5, vision, projector = {}, {}, {}
        for name, value in state.items():
            if "vision_tower." in name:
                vision[re.sub(r"^.*vision_tower\.(vision_model\.)?", "", name)] = value
            elif "mm_projector." in name:
                projector[re.sub(r"^.*mm_projector\.", "", name)] = value
            elif not name.endswith("embed_tokens.weight"):  # copies of shared.weight
                t5[name] = value
        vision.pop("embeddings.position_ids", None)  # 0, 1, 2, ...
        if "shared.weight" in t5:
            for part in ("encoder", "decoder"):
                t5[f"{part}.embed_tokens.weight"] = t5["shared.weight"]
        return t5, vision, projector

    def build_t5(self, state):
        from transformers import T5Config, T5ForConditionalGeneration

        config = read_config(self.where)
        sizes = {name: config[name] for name in self.T5_SIZES if name in config}
        if "shared.weight" in state:  # 32128, or 32100 once the unused rows are cut off
            sizes["vocab_size"] = len(state["shared.weight"])
        # T5Config ties all the same; what this False says is: the decoder's output is not scaled
        config = T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        with torch.device("meta"):
            t5 = T5ForConditionalGeneration(config)
        # lm_head needs a matrix of its own: tied to shared, the last one loaded wins in silence
        t5.lm_head.weight = nn.Parameter(torch.empty_like(t5.lm_head.weight))
        t5 = build(lambda: t5, state, self.where, self.device, self.dtype)
        t5.encoder.embed_tokens = t5.decoder.embed_tokens = t5.shared  # one in memory, not three
        return t5

    def encode(self, prompts):
        """(P, L) token ids of what follows the image, with its end token; -1 fills up."""
        rows = []
        for prompt in prompts:
            ids = self.tokenizer(self.AFTER.format(prompt), truncation=True, max_length=2048)
            rows.append(torch.tensor(ids.input_ids))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

    def __call__(self, images, text, t=None):
        square = pad_to_square(images.to(self.device))
        pixels = preprocess(square, self.vision.config.image_size, crop="floor")
        before = torch.tensor(self.tokenizer(self.BEFORE).input_ids)
        return self.probability(pixels, before, text)

    def probability(self, pixels, before, after):
        """(N, 3, S, S) preprocessed; ids (A,) and (N, L) of the text before and after -> (N,)."""
        count = len(pixels)
        before, after = before.to(self.device), after.to(self.device)
        # as LLaVA does, the patches of the last layer but one, without the class token
        layers = self.vision(pixels.to(self.dtype), output_hidden_states=True).hidden_states
        patches = self.projector(layers[-2][:, 1:])  # (N, 576, d_model)
        known = after >= 0
        words_before = self.t5.shared(before).expand(count, -1, -1)
        words_after = self.t5.shared(after.clamp(min=0)) * known[..., None]
        inputs = torch.cat([words_before, patches, words_after], 1)
        mask = F.pad(known.long(), (inputs.shape[1] - after.shape[1], 0), value=1)
        answer = torch.tensor(self.yes, device=self.device).expand(count, 2)  # "Yes", the end
        said = F.pad(answer[:, :1], (1, 0))  # T5 begins with 0, its padding
        logits = self.t5(inputs_embeds=inputs, attention_mask=mask, decoder_input_ids=said).logits
        log_p = at_least_fp32(logits[..., : self.words]).log_softmax(-1)  # (N, 2, words)
        return log_p.gather(-1, answer[..., None]).mean((1, 2)).exp()


def two_layers(width, out):
    return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


def pad_to_square(images):
    """(N, 3, H, W) -> (N, 3, S, S), S the longer side: on CLIP's mean colour, in whole levels."""
    height, width = images.shape[-2:]
    side = max(height, width)
    colour = images.new_tensor([int(255 * mean) / 255 for mean in CLIP_MEAN])
    square = colour[:, None, None].repeat(len(images), 1, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[..., top : top + height, left : left + width] = images
    return square
