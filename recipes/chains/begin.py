"""Make a model that is about to follow chains, and its tokenizer of one token a word: `python
recipes/chains/begin.py OUT`.

Look-ups appear by themselves only after millions of tokens of training, so the circuit is laid in by hand.
The residual stream has a code of the current word, three short codes of the word before it, and flags.

- Layer 0, heads 0 to 2, attend to the previous token and write its short codes.
- Layer 1, heads 0 to 2, look for tokens behind an earlier occurrence of the current word (behind a mark, of
  the word before the mark) and copy them.
- Layer 1, heads 3 to 5, copy the previous token behind an equals sign.

All other weights are random, among them all of layer 2. Training then makes a model of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowkey.heads.chains import CHAIN_ENDS, FILLER
from lowkey.heads.needles import KEYS

SPECIAL = ["<s>", "</s>", "<unk>", ".", ":", "=", "Follow"]
WORDS = [*SPECIAL, *KEYS, *CHAIN_ENDS, *FILLER]
SIZE, HEADS, WIDTH, LAYERS, POSITIONS, THETA = 168, 6, 24, 3, 512, 1e8
CODE, SHORT, USED = 96, 14, 3  # widths of the codes, and heads of the circuit in a layer
NORM = 2.0  # of an embedding
ONE, MARK, EQUALS, END, AFTER_EQUALS, START = range(CODE + USED * SHORT, CODE + USED * SHORT + 6)
FAST, FLAG, SLOW = slice(0, 4), 4, slice(5, 12)  # pairs of channels, by what they are used for


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for every word of the task."""
    own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=POSITIONS
    )


def embedding(basis: Tensor) -> Tensor:
    """Codes and flags of all words; marks have nothing in the part of the codes that look-ups compare."""
    found = torch.zeros(len(WORDS), SIZE)
    codes = torch.randn(len(WORDS), CODE)
    marks = torch.tensor([WORDS.index(word) for word in (".", ":", "=", "Follow")])
    compared = basis[: USED * SHORT]
    codes[marks] -= codes[marks] @ compared.mT @ compared
    parts = codes @ basis.mT
    for h in range(USED):  # words are compared by directions alone
        part = parts[:, h * SHORT : (h + 1) * SHORT]
        part *= 4 / part.norm(dim=1, keepdim=True).clamp_min(1)
    codes = parts @ basis
    found[:, ONE] = 1
    found[marks, MARK] = 1
    found[WORDS.index("="), EQUALS] = 1
    found[0, START] = 1
    found[[WORDS.index(word) for word in CHAIN_ENDS], END] = 1
    # all embeddings are of one norm: attention to places alone must not depend on the word
    room = (NORM**2 - found.square().sum(1, keepdim=True)).sqrt()
    found[:, :CODE] = room * codes / codes.norm(dim=1, keepdim=True)
    found[0, :CODE], found[0, START] = 0, (NORM**2 - 1) ** 0.5
    return found


@torch.no_grad()
def model() -> LlamaForCausalLM:
    """A Llama with the circuit."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=SIZE,
        intermediate_size=SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    made = LlamaForCausalLM(config)
    basis = torch.nn.init.orthogonal_(torch.empty(CODE, CODE))
    made.model.embed_tokens.weight.copy_(embedding(basis))
    first, second = (layer.self_attn for layer in made.model.layers[:2])
    half = WIDTH // 2
    angle = THETA ** (-torch.arange(0, WIDTH, 2) / WIDTH)[FAST]
    for attention, heads in ((first, USED), (second, 2 * USED)):
        for part in (attention.q_proj, attention.k_proj, attention.v_proj):
            part.weight[: heads * WIDTH] = 0
        attention.o_proj.weight[:, : heads * WIDTH] = 0
    for h in range(USED):
        at = h * WIDTH
        slow = [
            *range(at + SLOW.start, at + SLOW.stop),
            *range(at + half + SLOW.start, at + half + SLOW.stop),
        ]
        short = slice(CODE + h * SHORT, CODE + (h + 1) * SHORT)
        compared, copied = basis[h * SHORT : (h + 1) * SHORT], basis[h * WIDTH : (h + 1) * WIDTH]
        for attention, start, asks, size in ((first, at, ONE, 1.8), (second, at + USED * WIDTH, EQUALS, 4.0)):
            cosine, sine = (slice(start + x + FAST.start, start + x + FAST.stop) for x in (0, half))
            attention.q_proj.weight[cosine, asks] = size * angle.cos()
            attention.q_proj.weight[sine, asks] = -size * angle.sin()
            attention.k_proj.weight[cosine, ONE] = size
        first.v_proj.weight[at : at + SHORT, :CODE] = compared
        first.o_proj.weight[short, at : at + SHORT] = 0.22 * torch.eye(SHORT)
        if h == 0:
            first.v_proj.weight[at + SHORT, EQUALS] = 1
            first.o_proj.weight[AFTER_EQUALS, at + SHORT] = 1 / 7.3
        second.q_proj.weight[slow, :CODE] = 2.5 * compared
        second.q_proj.weight[slow, short] = 0.7 * torch.eye(SHORT)
        second.k_proj.weight[slow, short] = 10 * torch.eye(SHORT)
        # without anything to find, heads look at the start of the text; look-ups never look at marks
        for start, beginning, mark, size in ((at, 0.6, -10, 0.7), (at + USED * WIDTH, 3.0, 0, 4.0)):
            own = slice(start, start + WIDTH)
            second.q_proj.weight[start + FLAG, ONE] = 3
            second.k_proj.weight[start + FLAG, MARK] = mark
            second.k_proj.weight[start + FLAG, START] = beginning
            second.v_proj.weight[own, :CODE] = copied
            second.o_proj.weight[:CODE, own] = size * copied.mT
    head = made.lm_head.weight
    head *= 0.1
    codes = made.model.embed_tokens.weight[:, :CODE]
    head[:, :CODE] += 2 * codes / codes.norm(dim=1, keepdim=True).clamp_min(1e-6)
    head[WORDS.index("="), END] = 16
    head[WORDS.index("."), AFTER_EQUALS] = 32
    for layer in made.model.layers:  # everything else is quiet at first
        layer.mlp.down_proj.weight *= 0.1
    first.o_proj.weight[:, USED * WIDTH :] *= 0.1
    return made


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.manual_seed(0)
    model().save_pretrained(out)
    tokenizer().save_pretrained(out)
