"""Makes a small GPTBigCode base model, with its tokenizer, from text. Takes seconds for the embedded default.

The result is an ordinary checkpoint: transformers' Auto classes load it. What is special is where training
starts (`structured_init_`).
"""

import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import (
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)
from transformers.models.gpt_bigcode.modeling_gpt_bigcode import GPTBigCodeAttention, GPTBigCodeBlock

from dssk import prompts
from dssk.data.readers import BadRow, read_rows
from dssk.data.schemas import Dropped, to_qa
from dssk.errors import DsskError, short
from dssk.inference.fingerprint import file_fingerprint
from dssk.inference.tokenizer import FIM_TOKENS, PAD_TOKEN, load_tokenizer
from dssk.research import toy
from dssk.research.toy import Page
from dssk.utils.files import atomic_folder, only_writer

EOS_TOKEN = "<|endoftext|>"  # noqa: S105
SETTINGS_FILE = "make_base.json"
TOY_PAGES = 3000
MEMORY_TOKENS = 3  # that states have to keep with a `memory_weight`: their own and those before
SUBJECT_TOKENS = 2  # of a name, with a `subject_weight`
NAME_FLAG = 4.0  # of names in their embedding, as a multiple of its root mean square
# Of the heads that look at names: the score of a name, how much less it is for each token before it, and the share of
# what they add to a state, beside that of the other heads.
NAME_SCORE, POSITION_SCORE, NAME_SHARE = 15.0, 0.5, 0.4

MOST_WEIGHTS = 1_000_000_000  # of a base; larger ones are pretrained elsewhere


@dataclass(frozen=True)
class Settings:
    """What a base is made of and how; two equal settings make the same base."""

    source: tuple[str, ...]  # "toy", or the text files' fingerprints
    tokenizer: str  # "bpe:SIZE", or a folder
    lower_case: bool
    hidden_size: int
    layers: int
    heads: int
    positions: int  # tokens
    steps: int
    batch_size: int  # documents
    learning_rate: float
    memory_weight: float  # of a loss by which states keep their last tokens; 0 for none
    subject_weight: float  # of one by which they keep the name of what the text is about; 0 for none
    seed: int
    template_version: int = prompts.TEMPLATE_VERSION

    def __post_init__(self) -> None:
        if self.heads < 2 or self.hidden_size % (2 * self.heads):
            raise DsskError(
                f"--hidden_size {self.hidden_size} with --heads {self.heads}: want at least 2 heads, each an even "
                "number of units wide"
            )
        if self.subject_weight and (self.heads < SUBJECT_TOKENS + 2 or self.hidden_size // self.heads < 8):
            raise DsskError(
                f"--subject_weight with --heads {self.heads} of {self.hidden_size // self.heads} units: two heads look "
                "at names, want two more, and at least 8 units each"
            )
        width = self.hidden_size
        if (size := 12 * self.layers * width**2 + self.positions * width) > MOST_WEIGHTS:
            raise DsskError(
                f"--layers {self.layers}, --hidden_size {width} and --positions {self.positions} are {size:.1e} "
                f"parameters: want at most {MOST_WEIGHTS:.0e}, what is made here is small"
            )
        weights = (self.memory_weight, self.subject_weight)
        if self.steps < 0 or not self.learning_rate > 0 or not all(weight >= 0 for weight in weights):
            raise DsskError(
                f"--steps {self.steps}, --learning_rate {self.learning_rate}, --memory_weight "
                f"{self.memory_weight}, --subject_weight {self.subject_weight}: want a rate above 0, and none of "
                "them below 0"
            )


def make_base(output: Path, settings: Settings, pages: list[Page]) -> None:
    """Make the base of `settings` out of `pages` and save it to the folder `output`."""
    tokenizer = _tokenizer(settings, pages)
    config = GPTBigCodeConfig(
        vocab_size=len(tokenizer),
        n_positions=settings.positions,
        n_embd=settings.hidden_size,
        n_layer=settings.layers,
        n_head=settings.heads,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        dtype="float32",
    )
    subjects = [subject_tokens(page, tokenizer) for page in pages] if settings.subject_weight else []
    model = build_base(config, settings.seed, [sorted(set(words)) for words in zip(*subjects, strict=True)])
    documents = make_documents(pages, tokenizer, settings.positions, settings.seed)
    train_language_model(model, documents, settings, subjects)
    _save(output, model, tokenizer, settings)


def make_tokenizer(texts: list[str], vocab_size: int, lower_case: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`, with StarCoder's first five special tokens and its single digits."""
    bpe = Tokenizer(models.BPE())
    if lower_case:
        bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, *FIM_TOKENS, PAD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOS_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
    )


def build_base(
    config: GPTBigCodeConfig, seed: int, names: Sequence[Sequence[int]] = ()
) -> GPTBigCodeForCausalLM:
    """An untrained base with a structured first layer; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPTBigCodeForCausalLM(config)
    structured_init_(model, torch.Generator().manual_seed(seed))
    if names:
        look_at_names_(model, names)
    return model


@torch.no_grad()
def structured_init_(model: GPTBigCodeForCausalLM, generator: torch.Generator) -> None:
    """Let the heads of the first block look 1, 2, 3, ... tokens back, before any training.

    Cross-attention finds an answer in the states of a context as induction heads do: "where were the words
    that I have just read, and what came next?" (Olsson et al. 2022, arXiv 2209.11895). It can, if a state
    tells its own token *and* those before it; large models have such previous-token heads, small ones learn
    them only after far more steps than we have. So they are written down here. A part of the width, as wide
    as a head, is for positions, the rest for tokens;

    - a position is sines and cosines, so that a rotation of the query is a shift by whole tokens,
    - head h asks for the position h + 1 tokens back, and all heads share the key: the position itself,
    - the value is a projection of the token's part, which each head brings to the residual in its own way.
    """
    # d hidden size, D head size = size of the part for positions, H heads
    config, first = model.config, cast(GPTBigCodeAttention, model.transformer.h[0].attn)
    hidden, heads, dim = config.hidden_size, config.num_attention_heads, first.head_dim
    scale = 0.1  # root mean square of the embeddings and of what each head adds to them
    sharpness = 3.0  # of the attention: e^17 : 1 at D = 32 for the right token against an unlike one

    # Frequencies so spread that no other shift within the window looks like a shift of 0.
    frequencies = math.pi * ((torch.arange(dim // 2) + 0.5) / (dim // 2)) ** 1.5
    angles = torch.arange(config.max_position_embeddings)[:, None] * frequencies
    positions, tokens = model.transformer.wpe.weight, model.transformer.wte.weight
    positions.zero_()
    positions[:, :dim] = scale * math.sqrt(2) * torch.cat([angles.cos(), angles.sin()], dim=1)
    tokens.normal_(std=scale, generator=generator)
    tokens[:, :dim] = 0.0

    query, key, value = first.c_attn.weight.split([hidden, dim, dim])  # (H * D, d), (D, d), (D, d)
    query.zero_(), key.zero_()
    for head in range(heads):
        cos, sin = torch.diag((frequencies * (head + 1)).cos()), torch.diag((frequencies * (head + 1)).sin())
        back = torch.cat([torch.cat([cos, sin], dim=1), torch.cat([-sin, cos], dim=1)])
        query[head * dim : (head + 1) * dim, :dim] = sharpness * back
    key[:, :dim] = torch.eye(dim)
    value.normal_(std=1 / math.sqrt(hidden - dim), generator=generator)
    value[:, :dim] = 0.0
    first.c_proj.weight.normal_(std=scale / math.sqrt(dim), generator=generator)


@torch.no_grad()
def look_at_names_(model: GPTBigCodeForCausalLM, names: Sequence[Sequence[int]]) -> None:
    """Let the last heads of the first block look at names, wherever they stand: each at a word of them.

    Later sentences say "the town": a state that is to tell whose it is has to find the name. `names` are the tokens
    that begin names, those that go on with them, ... A unit of the key is for each, in place of one of the finest
    sines; a name's embedding has it. The coarsest sine rises with the position, so that the first name counts most.
    """
    first = cast(GPTBigCodeAttention, model.transformer.h[0].attn)
    hidden, dim = model.config.hidden_size, first.head_dim
    positions, tokens = model.transformer.wpe.weight, model.transformer.wte.weight
    query = first.c_attn.weight[:hidden].view(-1, dim, hidden)  # (H, D, d)
    bias = first.c_attn.bias[:hidden].view(-1, dim)
    scale = positions[0, 0] / math.sqrt(2)
    slope = math.asin(float(positions[1, dim // 2] / positions[0, 0]))  # of the coarsest sine
    for number, words in enumerate(names, start=1):
        head, unit = -number, dim - number
        pair = torch.tensor([unit - dim // 2, unit])
        positions[:, pair] = 0.0
        query[:, pair] = 0.0
        tokens[torch.tensor(words), unit] = NAME_FLAG * scale
        query[head] = 0.0
        bias[head, unit] = NAME_SCORE * math.sqrt(dim) / NAME_FLAG
        bias[head, dim // 2] = -POSITION_SCORE * math.sqrt(dim / 2) / slope
        first.c_proj.weight.view(hidden, -1, dim)[:, head] *= NAME_SHARE


def subject_tokens(page: Page, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The first token of each of the first two words of what a page is about, inside of a sentence."""
    return [tokenizer(f" {word}")["input_ids"][0] for word in page.subject.split()[:SUBJECT_TOKENS]]


def make_documents(
    pages: list[Page], tokenizer: PreTrainedTokenizerBase, max_tokens: int, seed: int
) -> list[list[int]]:
    """Each page as token ids: its paragraph, then its questions with their answers, as the decoder reads it.

    Half of the documents say their paragraph twice, since repeating is what cross-attention builds on; a
    tenth leaves it out, since questions come without their context later. All are cut to `max_tokens`.
    """
    rng = np.random.default_rng(seed)
    eos = tokenizer.eos_token or ""
    texts = []
    for paragraph, questions, _ in pages:
        dice = rng.random()
        repeats = 0 if dice < 0.1 else 1 if dice < 0.5 else 2
        asked = [prompts.question(question) + prompts.answer(answer) + eos for question, answer in questions]
        texts.append((prompts.context(paragraph) + eos) * repeats + "".join(asked))
    return [ids[:max_tokens] for ids in tokenizer(texts)["input_ids"]]


def train_language_model(
    model: GPTBigCodeForCausalLM,
    documents: list[list[int]],
    settings: Settings,
    subjects: list[list[int]] | None = None,
) -> float:
    """Train on the next token of the documents; returns the mean loss of the last tenth of the steps.

    With a `memory_weight` the states also have to keep what the structured first layer gives them, and that layer's
    attention stays as it is: on real text the language model would else wear it away. With a `subject_weight` they have
    to keep the `subjects` of their documents, tokens of its name each.
    """
    if not settings.steps:
        return math.nan
    hidden = model.config.hidden_size
    memory = Recall(hidden, MEMORY_TOKENS, settings.seed) if settings.memory_weight else None
    subject = Recall(hidden, SUBJECT_TOKENS, settings.seed) if subjects else None
    if memory is not None:
        first = cast(GPTBigCodeBlock, model.transformer.h[0])
        for module in (model.transformer.wpe, first.ln_1, first.attn):
            module.requires_grad_(False)
    if subject is not None:  # what the heads that look at names go by
        dim = hidden // model.config.num_attention_heads
        model.transformer.wte.weight.register_hook(
            lambda gradient: gradient.index_fill(1, torch.arange(dim), 0.0)
        )
    readers = [
        parameter for recall in (memory, subject) if recall is not None for parameter in recall.parameters()
    ]
    trained = [parameter for parameter in (*model.parameters(), *readers) if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, settings.steps // 10, settings.steps)
    batches = _batches(documents, settings.batch_size, np.random.default_rng(settings.seed))
    losses, num_tokens, started = [], 0, time.monotonic()
    model.train()
    progress = tqdm(range(settings.steps), desc="language model", unit="step", disable=None)
    for _ in progress:
        input_ids, labels, numbers = next(batches)  # (B, T), (B, T), (B,)
        states = model.transformer(input_ids, use_cache=False).last_hidden_state  # (B, T, d)
        loss = nn.functional.cross_entropy(
            model.lm_head(states[:, :-1]).flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        losses.append(loss.item())
        if memory is not None:
            loss = loss + settings.memory_weight * memory(states, last_tokens(labels), model.lm_head)
        if subject is not None and subjects:
            named = torch.tensor([subjects[number] for number in numbers])
            loss = loss + settings.subject_weight * subject(states, once_named(labels, named), model.lm_head)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        num_tokens += int((labels >= 0).sum())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    final = float(np.mean(losses[-max(1, settings.steps // 10) :]))
    speed = num_tokens / (time.monotonic() - started)
    print(f"language model: {num_tokens:,} tokens at {speed:,.0f} a second, loss {final:.3f}")
    return final


def last_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Each position's own token and those before it (B, T, MEMORY_TOKENS), of labels (B, T); -100 = none."""
    shifted = [
        nn.functional.pad(labels, (back, 0), value=-100)[:, : labels.shape[1]]
        for back in range(MEMORY_TOKENS)
    ]
    told = torch.stack(shifted, dim=-1)
    return told.masked_fill((told < 0).any(-1, keepdim=True), -100)


def once_named(labels: torch.Tensor, subjects: torch.Tensor) -> torch.Tensor:
    """The tokens `subjects` (B, n) at each position (B, T, n) from where the last of them first stands; -100 before."""
    named = (labels == subjects[:, -1:]).cumsum(1).bool() & (labels >= 0)
    return torch.where(named[..., None], subjects[:, None], -100)


class Recall(nn.Module):
    """How badly the last hidden states tell tokens of before: a second training loss.

    One linear reader for each of `num_tokens`, thrown away afterwards, guesses it through the LM head. A random few
    hundred positions of a batch are enough, so it costs next to nothing.
    """

    num_positions = 384

    def __init__(self, hidden_size: int, num_tokens: int, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.readers = nn.ParameterList(
            nn.init.normal_(
                torch.empty(hidden_size, hidden_size), std=hidden_size**-0.5, generator=self.generator
            )
            for _ in range(num_tokens)
        )

    def forward(self, states: torch.Tensor, told: torch.Tensor, lm_head: nn.Module) -> torch.Tensor:
        """The readers' summed cross-entropy on states (B, T, d) that are to tell tokens (B, T, n; -100 = none)."""
        rows, columns = (told[..., 0] >= 0).nonzero(as_tuple=True)
        drawn = torch.randint(len(rows), (self.num_positions,), generator=self.generator)
        rows, columns = rows[drawn], columns[drawn]
        chosen = states[rows, columns]
        losses = [
            nn.functional.cross_entropy(lm_head(chosen @ reader), told[rows, columns, number])
            for number, reader in enumerate(self.readers)
        ]
        return torch.stack(losses).sum()


def _batches(
    documents: list[list[int]], batch_size: int, rng: np.random.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[int]]]:
    """Endless shuffled batches of documents of like length: (input_ids, labels), padded on the right, and which."""
    while True:
        order = rng.permutation(len(documents))
        by_length = [
            sorted(pool, key=lambda i: len(documents[i]))
            for pool in np.array_split(order, max(1, len(order) // (8 * batch_size)))
        ]
        batches = [pool[i : i + batch_size] for pool in by_length for i in range(0, len(pool), batch_size)]
        for index in rng.permutation(len(batches)):
            rows = [torch.tensor(documents[i]) for i in batches[index]]
            labels = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
            # What stands at padding is never read: it is on the right.
            yield labels.clamp(min=0), labels, batches[index]


def read_pages(paths: list[Path]) -> list[Page]:
    """The contexts of QA files in any schema that preprocessing reads, each with its questions and answers."""
    pages: dict[str, list[tuple[str, str]]] = {}
    malformed: list[str] = []
    for row in read_rows(map(str, paths)):
        try:
            qa = to_qa(row)
        except Dropped:
            continue
        except BadRow as error:  # text to learn from can do without
            malformed.append(f"{row.place}: {error}" if not malformed else "")
            continue
        pages.setdefault(qa.context, []).append((qa.question, qa.answers[0]))
    if malformed:
        said = f"{len(malformed)} malformed rows are left out, the first {malformed[0]}"
        print(f"dssk: {short(said)}", file=sys.stderr)
    if not pages:
        raise DsskError(f"no usable row in {paths[0]}: want rows of context, question and answer")
    return [Page(context, questions) for context, questions in pages.items()]


def _tokenizer(settings: Settings, pages: list[Page]) -> PreTrainedTokenizerBase:
    kind, _, size = settings.tokenizer.partition(":")
    if kind != "bpe":
        return load_tokenizer(settings.tokenizer)
    texts = [prompts.context(page.paragraph) for page in pages]
    for _, questions, _ in pages:
        texts += [prompts.question(question) + prompts.answer(answer) for question, answer in questions]
    return make_tokenizer(texts, int(size), settings.lower_case)


def _save(
    output: Path, model: GPTBigCodeForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> None:
    with atomic_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / SETTINGS_FILE).write_text(json.dumps(asdict(settings), indent=2) + "\n")


def _finished(output: Path, settings: Settings) -> bool:
    """Whether `output` already holds this very base; anything else there is refused."""
    if not output.exists():
        return False
    try:
        found = json.loads((output / SETTINGS_FILE).read_text())
    except OSError:
        raise DsskError(f"{output} exists and is no base made here: choose another --output") from None
    found = {"subject_weight": 0.0, **found}  # older bases do not name it
    wanted = json.loads(json.dumps(asdict(settings)))
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        key = different[0]
        raise DsskError(
            f"{output} holds a base made with {key} {found.get(key)}, not {wanted[key]}: choose another "
            "--output, or remove that folder"
        )
    return True


def make_base_of(args: Namespace) -> None:
    """Do what the flags of `dssk base` say, unless the folder holds that base already."""
    if args.text:
        if args.subject_weight:
            raise DsskError("--subject_weight is for --dataset toy: no file says what its texts are about")
        pages = read_pages(args.text)
        source = tuple(file_fingerprint(path) for path in args.text)
    else:
        source = ("toy",)
        pages = toy.pages(TOY_PAGES, args.seed)
    settings = Settings(
        source=source, **{k: v for k, v in vars(args).items() if k in Settings.__annotations__}
    )
    with only_writer(args.output):
        if _finished(args.output, settings):
            print(f"{args.output} already holds this base: re-using it")
            return
        make_base(args.output, settings, pages)
    print(f"made {args.output}")
