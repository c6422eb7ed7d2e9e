"""Masked diffusion language models: any transformers model that `AutoModelForMaskedLM` opens and that was trained on all mask rates.

`load("text")` is the embedded character model, `load("toy")` a Markov chain in closed form with a table as student."""
from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from torch import Tensor

from ..data import text as texts
from ..denoiser import Denoiser
from ..errors import UserError
from ..metrics import text as metrics
from ..tokens import Masked
from ..toy_tokens import Chain, Table, states
from .base import Backbone, Examples, Source

BUILT_IN = Path(__file__).parent.parent / "assets" / "text" / "teacher"
LONGEST = 1024           # tokens of a sequence unless more are asked for
REFERENCE = 20_000       # real sequences that samples are compared with


def load(teacher, data: str = "", guidance: float = 0.0, length: int = 0) -> "Tokens":
    """A Backbone of tokens: "text", "toy", a transformers folder or a Hub id; a Backbone is returned as it is.

    data: a text file (default: the teacher's own); length: tokens of a sequence, 0 for the teacher's own. Raises UserError for what
    is no masked language model, and for guidance, which these unconditional models have none of."""
    if guidance not in (0.0, 1.0):
        raise UserError(f"--guidance {guidance:g}: a text teacher is unconditional and has no guidance; leave it out")
    if isinstance(teacher, Backbone):
        if not isinstance(teacher, Tokens):
            raise UserError(f"{teacher.name} is no token model: this method distils masked language models")
        return teacher
    if teacher == "toy":
        if data or length:
            raise UserError("the toy draws its own sequences of fixed length: leave --data and --length out")
        return ToyText()
    folder = str(BUILT_IN) if teacher == "text" else str(teacher)
    if not Path(folder).is_dir() and ("/" not in folder or folder.startswith((".", "/", "~"))):
        raise UserError(f"unknown text teacher {teacher!r}: give text, toy, a transformers folder of a masked language model, or a Hub id such as user/name")
    if not data and teacher != "text":
        raise UserError(f"--teacher {teacher} needs text to distil on: give --data FILE.txt")
    return Text(folder, name=str(teacher), data=data or "text", length=length)


class Tokens(Backbone):
    """What token backbones share. tokens [N, L]: real sequences; judge: a model of them with `log_prob`; symbols: V, mask included."""

    pred, guidance, modality = "logits", 1.0, "text"
    tokens: Tensor
    symbols: int

    def batches(self, images=False):
        return Source(len(self.tokens), lambda index: {"cond": {}, "uncond": {}, "x0": self.tokens[index]})

    def examples(self, n, seeds=1):
        return Examples(["sample"] * (n * seeds), {}, {})

    def encode(self, text: str) -> list[int]:
        """A string as token numbers."""
        raise NotImplementedError

    def decode(self, x: Tensor) -> list[str]:
        """Token sequences as strings."""
        raise NotImplementedError

    def measure(self, x: Tensor) -> dict[str, float]:
        """What is said of samples x [N, L]: distance to the real sequences, bits per token of the judge, entropy and variety."""
        x = x.cpu()
        return {"ngram_js": metrics.ngram_js(x, self.tokens[:REFERENCE], self.symbols),
                "bits_per_token": -self.judge.log_prob(x).mean().item() / x.shape[1] / math.log(2),
                "entropy": metrics.entropy(x), "distinct": metrics.distinct(x, self.symbols)}


class Text(Tokens):
    """A masked language model of transformers with its tokenizer. Time is not given to the network: the number of masks tells it."""

    family = "text"
    bf16_on_cpu = True       # half the time of a training step where the CPU has it
    lora_targets = r".*\.(query|key|value|dense|Wqkv|Wo|Wi|q_proj|k_proj|v_proj|o_proj|out_proj|q_lin|k_lin|v_lin|out_lin|lin1|lin2)"

    def __init__(self, folder: str, name: str, data: str = "", length: int = 0):
        from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer
        self.folder, self.name, self.data = folder, name, data
        try:
            self.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            config = copy.deepcopy(self.config)
            for key, value in config.to_dict().items():       # off in every role, also where checkpointing needs training mode
                if "dropout" in key and isinstance(value, float):
                    setattr(config, key, 0.0)
            self.module = AutoModelForMaskedLM.from_pretrained(folder, config=config, dtype=torch.float32, use_safetensors=True,
                                                               trust_remote_code=False)          # unsaid, transformers asks the user
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{name} is no masked language model that transformers opens ({type(error).__name__}: {str(error).splitlines()[0]}): "
                            "give a folder or Hub id of one, such as text") from error
        if self.tokenizer.mask_token_id is None:
            raise UserError(f"the tokenizer of {name} has no mask token: a masked diffusion model needs one")
        self.module.requires_grad_(False).eval()
        most = getattr(config, "max_position_embeddings", LONGEST)
        if length > most:
            raise UserError(f"--length {length}: {name} reads at most {most} tokens")
        self.shape = (length or min(most, LONGEST),)
        if self.shape[0] <= 256 and not torch.cuda.is_available():
            self.module.set_attn_implementation("eager")      # on a CPU the fused kernel's backward pass doubles the time of a step
        self.process, self.symbols = Masked(self.tokenizer.mask_token_id), config.vocab_size
        self._read = None

    def forward(self, module, z, timestep, cond):
        return module(input_ids=z).logits

    def make(self, role, **options):
        net = super().make(role, **options)
        if any(getattr(m, "gradient_checkpointing", False) for m in net.module.modules()):
            net.module.train()           # transformers checkpoints in training mode only; every dropout is 0
        return net

    def load_student(self, module, role, folder, slot):
        if role is not None:
            return super().load_student(module, role, folder, slot)
        from transformers import AutoModelForMaskedLM

        from ..hub.export import read_record
        if read_record(Path(folder))[1]["family"] != self.family:
            raise UserError(f"--init_student {folder} is no text student: start from a student of the same teacher")
        theirs = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
        state, own = theirs.state_dict(), module.state_dict()
        if state.keys() != own.keys() or any(state[k].shape != own[k].shape for k in own):
            raise UserError(f"--init_student {folder} does not fit the teacher {self.name}: start from a student of the same teacher")
        module.load_state_dict(state)

    # ---------------------------------------------------------------------------------------------- data and measurement
    def _windows(self):
        """Sequences, the judge and the lexicon; read on first use."""
        if self._read is None:
            text, length = texts.read(self.data), self.shape[0]
            ids = self._tokenize(text)
            if len(ids) < length:
                raise UserError(f"--data {self.data} has {len(ids)} tokens, too few for sequences of {length}: give more text or a smaller --length")
            windows = ids[: len(ids) // length * length].reshape(-1, length)
            self._read = windows, metrics.NGram(ids, self.symbols), set(metrics.words(text))
        return self._read

    def _tokenize(self, text: str) -> Tensor:
        pieces = [text[i: i + 20_000] for i in range(0, len(text), 20_000)]
        encoded = self.tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor([i for piece in encoded for i in piece])

    tokens = property(lambda self: self._windows()[0])
    judge = property(lambda self: self._windows()[1])

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, x):
        return self.tokenizer.batch_decode(x, clean_up_tokenization_spaces=False)

    def measure(self, x):
        return super().measure(x) | {"known_words": metrics.known_words(self.decode(x), self._windows()[2])}


class ToyText(Tokens):
    """A Markov chain over a few letters: exact teacher, a table that starts as the teacher for every trainable role, 4096 draws as data."""

    family = "toy-text"

    def __init__(self, chain: Chain | None = None):
        if chain is None:         # a noisy cycle: a, b, c, a ... with slips
            chain = Chain(torch.full((3,), 1 / 3), 0.85 * torch.eye(3).roll(1, 1) + 0.05, 5)
        self.name = self.data = "toy-text"
        self.chain = self.judge = chain
        self.process, self.symbols, self.shape = chain.process, chain.symbols + 1, (chain.length,)
        self.module = Table(chain.symbols, chain.length)
        every = states(chain.symbols + 1, chain.length)
        self.module.logits.data = torch.nn.functional.pad(chain.posterior(every).clamp(min=1e-30).log(), (0, 1)).float()
        self.module.requires_grad_(False)
        self.tokens = chain.sample(4096, seed=1)

    @property
    def teacher(self):
        return self.chain

    def make(self, role, *, lora=0, init="", gradient_checkpointing=False, **options) -> Denoiser:
        if lora or gradient_checkpointing:
            raise UserError("the toy's student is a table: leave --lora and --gradient_checkpointing out")
        return super().make(role, init=init, **options)

    def forward(self, module, z, timestep, cond):
        return module(z)

    def encode(self, text):
        ids = ["abcdefghijklmnopqrstuvwxyz".find(c) for c in text]
        if not all(0 <= i < self.chain.symbols for i in ids):
            raise UserError(f"the toy writes the first {self.chain.symbols} letters only, not {text!r}")
        return ids

    def decode(self, x):
        return ["".join("abcdefghijklmnopqrstuvwxyz"[i] for i in row) for row in x.tolist()]
