"""Judges in which a language model reads the prompt while it looks at the image."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from loss import at_least_fp32
from parts import judges_clip
from parts.judges_clip import preprocess, renamed, take, tokenize, tower
from parts.weights import build, find, load_tokenizer, read_folder, read_state


class ImageReward:
    """BLIP's text encoder reads the prompt while it looks at the image (Xu et al. 2023).
    A linear head on its [CLS] state is the reward, standardised over the authors' data."""

    MEAN, STD = 0.16717362830052426, 1.0333394966054072
    CONFIG = dict(
        vision=tower(1024, 24, 16, image_size=224, patch_size=16, layer_norm_eps=1e-6),
        text=tower(768, 12, 12, encoder_hidden_size=1024, layer_norm_eps=1e-12),
    )
    NAMES = {  # of BLIP's vision tower -> of BlipVisionModel
        r"^cls_token": "embeddings.class_embedding",
        r"^pos_embed": "embeddings.position_embedding",
        r"^patch_embed\.proj": "embeddings.patch_embedding",
        r"^blocks": "encoder.layers",
        r"\.attn\.qkv": ".self_attn.qkv",
        r"\.attn\.proj": ".self_attn.projection",
        r"\.norm(\d)": r".layer_norm\1",
        r"^norm": "post_layernorm",
    }

    def __init__(self, device, weights, dtype=torch.float32):
        import transformers

        where = find("THUDM/ImageReward", "ImageReward.pt", weights)
        bert = "google-bert/bert-base-uncased"
        self.tokenizer = load_tokenizer(transformers.BertTokenizer, bert, weights)
        vision, text, head = self.split(read_state(where))
        # is_decoder makes cross-attention; forward is not told of it, so attention looks both ways
        text_config = transformers.BlipTextConfig(**self.CONFIG["text"], is_decoder=True)
        vision_config = transformers.BlipVisionConfig(**self.CONFIG["vision"])
        options = where, device, dtype
        self.text = build(lambda: transformers.BlipTextModel(text_config, False), text, *options)
        self.vision = build(lambda: transformers.BlipVisionModel(vision_config), vision, *options)
        self.head = build(lambda: judges_clip.linear_head(text_config.hidden_size), head, *options)

    @classmethod
    def split(cls, state):
        """The checkpoint -> those of BlipVisionModel, BlipTextModel and the head."""
        vision = renamed(take(state, r"blip\.visual_encoder\."), cls.NAMES)
        text = take(state, r"blip\.text_encoder\.")
        take(state, r"blip\.(vision|text)_proj\.")  # of BLIP's contrastive loss, not used
        # the head's, or else of no known name: build() will say so
        return vision, text, renamed(state, {r"^mlp\.layers\.": ""})

    def encode(self, prompts):
        """(P, 2, 35) token ids and their mask: no text is encoded before the image is seen."""
        return tokenize(self.tokenizer, prompts, 35)

    def __call__(self, images, text, t=None):
        pixels = preprocess(images, self.vision.config.image_size)
        return self.reward(pixels.to(self.vision.device), text.to(self.vision.device))

    def reward(self, pixels, text):
        """(N, 3, S, S) preprocessed, (N, 2, L) -> (N,)."""
        seen = self.vision(pixels.to(self.vision.dtype)).last_hidden_state  # (N, 1 + patches, 1024)
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

    BEFORE = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: "
    )
    AFTER = '\nDoes this figure show "{}"? Please answer yes or no. ASSISTANT: '
    CONFIG = tower(  # of the vision tower; T5's are in config.json
        1024, 24, 16, "quick_gelu", image_size=336, patch_size=14, projection_dim=768
    )
    T5_SIZES = (
        "vocab_size d_model d_kv d_ff num_layers num_decoder_layers num_heads "
        "relative_attention_num_buckets relative_attention_max_distance"
    ).split()

    def __init__(self, device, weights, dtype=None):
        from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel

        dtype = dtype or (torch.bfloat16 if "cuda" in str(device) else torch.float32)
        where = find("zhiqiulin/clip-flant5-xxl", None, weights)
        self.tokenizer = load_tokenizer(AutoTokenizer, "google/flan-t5-xl", weights)
        self.yes = self.tokenizer("Yes").input_ids  # one token and the end
        self.words = len(self.tokenizer)  # 32100 of 32128 logits: the reference cuts off the rest
        t5_config, state = read_folder(where)
        t5, vision, projector = self.split(state)
        options = where, device, dtype
        self.t5 = build(lambda: self.make_t5(t5_config), t5, *options)
        self.t5.encoder.embed_tokens = self.t5.decoder.embed_tokens = self.t5.shared
        vision_config = CLIPVisionConfig(**self.CONFIG)
        self.vision = build(lambda: CLIPVisionModel(vision_config), vision, *options)
        widths = vision_config.hidden_size, self.t5.config.d_model
        self.projector = build(lambda: judges_clip.two_layers(*widths), projector, *options)

    @staticmethod
    def split(state):
        """The checkpoint -> those of T5ForConditionalGeneration, CLIPVisionModel, the projector."""
        vision = take(state, r".*vision_tower\.(vision_model\.)?")
        projector = take(state, r".*mm_projector\.")
        take(state, r".*embed_tokens\.weight")  # copies of shared.weight
        return state, vision, projector

    def make_t5(self, config):
        """T5 without the encoder's and the decoder's embeddings, which are the shared ones."""
        from transformers import T5Config, T5ForConditionalGeneration

        sizes = {name: config[name] for name in self.T5_SIZES if name in config}
        # T5Config ties all the same; what this False says is: the decoder's output is not scaled
        config = T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        t5 = T5ForConditionalGeneration(config)
        # lm_head needs a matrix of its own: tied to shared, the last one loaded wins in silence
        t5.lm_head.weight = nn.Parameter(torch.empty_like(t5.lm_head.weight))
        del t5.encoder.embed_tokens, t5.decoder.embed_tokens
        return t5

    def encode(self, prompts):
        """(P, 2, L) token ids of what follows the image, with its end token, and their mask."""
        questions = [self.AFTER.format(prompt) for prompt in prompts]
        return tokenize(self.tokenizer, questions, 2048, padding="longest")

    def __call__(self, images, text, t=None):
        pixels = preprocess(pad_to_square(images), self.vision.config.image_size, crop=math.floor)
        before = torch.tensor(self.tokenizer(self.BEFORE).input_ids)
        device = self.vision.device
        return self.probability(pixels.to(device), before.to(device), text.to(device))

    def probability(self, pixels, before, after):
        """(N, 3, S, S) preprocessed; ids (A,) before, ids and mask (N, 2, L) after -> (N,)."""
        count = len(pixels)
        # as LLaVA does, the patches of the last layer but one, without the class token
        layers = self.vision(pixels.to(self.vision.dtype), output_hidden_states=True).hidden_states
        patches = self.projector(layers[-2][:, 1:])  # (N, 576, d_model)
        words_before = self.t5.shared(before).expand(count, -1, -1)
        words_after, mask = self.t5.shared(after[:, 0]), after[:, 1]
        inputs = torch.cat([words_before, patches, words_after], 1)
        mask = F.pad(mask, (inputs.shape[1] - mask.shape[1], 0), value=1)
        answer = torch.tensor(self.yes, device=pixels.device).expand(count, 2)  # "Yes", the end
        said = F.pad(answer[:, :1], (1, 0))  # T5 begins with 0, its padding
        logits = self.t5(inputs_embeds=inputs, attention_mask=mask, decoder_input_ids=said).logits
        log_p = at_least_fp32(logits[..., : self.words]).log_softmax(-1)  # (N, 2, words)
        return log_p.gather(-1, answer[..., None]).mean((1, 2)).exp()


def pad_to_square(images):
    """(N, 3, H, W) -> (N, 3, S, S), S the longer side: on CLIP's mean colour, in whole levels."""
    height, width = images.shape[-2:]
    side = max(height, width)
    colour = images.new_tensor([int(255 * mean) / 255 for mean in judges_clip.CLIP_MEAN])
    square = colour[:, None, None].repeat(len(images), 1, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[..., top : top + height, left : left + width] = images
    return square
