"""The whole model in torch: what is trained here, and what measures the accuracy."""

import torch
from torch import Tensor, nn

from tiny.language import Block, Experts, LanguageModel
from tiny.shape import TextShape, VisionShape
from tiny.text import IMAGE, VOCABULARY
from tiny.vision import VisionModel

IMAGE_ID = VOCABULARY.index(IMAGE)


class Step3(nn.Module):
    """Step-3 at any size; ``state_dict`` has the names of the released checkpoint."""

    def __init__(self, text: TextShape, vision: VisionShape) -> None:
        super().__init__()
        wide = vision.output_hidden_size
        self.vision_model = VisionModel(vision)
        self.vit_downsampler = nn.Conv2d(vision.hidden_size, wide, 2, 2)
        self.vit_downsampler2 = nn.Conv2d(wide, 2 * wide, 3, 2, 1)
        self.vit_large_projector = nn.Linear(2 * wide, text.hidden_size, bias=False)
        self.model = LanguageModel(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.apply(_scale)
        _start_small(self)

    def see(self, pixels: Tensor) -> Tensor:
        """Shapes: pixels (images, 3, side, side) -> image rows (images, image_tokens, hidden)."""
        grid = self.vit_downsampler2(self.vit_downsampler(self.vision_model(pixels)))
        rows: Tensor = self.vit_large_projector(grid.flatten(2).transpose(1, 2))
        return rows

    def forward(self, ids: Tensor, image_rows: Tensor) -> Tensor:
        """Merge the image rows in and run the language model, without the head.

        Shapes: ids (seqs, tokens), image_rows (images, image_tokens, hidden), in the order in which
        the ids mark them -> (seqs, tokens, hidden).
        """
        x = self.model.embed_tokens(ids)
        here = (ids == IMAGE_ID)[..., None]
        out: Tensor = self.model(x.masked_scatter(here, image_rows.to(x.dtype)))
        return out

    def blocks(self) -> list[Block]:
        """The layers, with their type."""
        return [b for b in self.model.layers if isinstance(b, Block)]

    def experts(self) -> list[Experts]:
        """The routed experts of every MoE layer."""
        return [b.moe for b in self.blocks() if b.is_moe]


def _scale(module: nn.Module) -> None:
    """Start linears and convs at unit gain and without bias."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _start_small(net: Step3) -> None:
    """Let each sub-layer add little at first, and let every answer be about as likely."""
    nn.init.normal_(net.vision_model.embeddings.position_embedding.weight, std=0.3)
    nn.init.normal_(net.model.embed_tokens.weight, std=0.5)
    nn.init.normal_(net.lm_head.weight, std=0.02)
    share = (2 * len(net.model.layers)) ** -0.5
    with torch.no_grad():
        for block in net.blocks():
            block.self_attn.o_proj.weight *= share
            if block.is_moe:
                block.moe.down_proj.weight *= share
                block.share_expert.down_proj.weight *= share
                nn.init.normal_(block.moe.gate.weight, std=0.02)
            else:
                block.mlp.down_proj.weight *= share
