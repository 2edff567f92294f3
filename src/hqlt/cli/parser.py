"""From a function to its options: what a command line may say, and what is said about one that cannot be read."""

from __future__ import annotations

import difflib
import inspect
import json
import keyword
import re
from collections.abc import Callable, Collection, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

MODEL_FIELDS = (
    "window", "blend", "mixer", "fast_weights", "hidden_size", "num_heads", "num_hidden_layers", "vocab_size",
)  # fmt: skip
SAME = """
learning_rate lr max_lr peak_lr
steps epochs iterations iters updates max_steps num_steps n_steps max_iters timesteps total_timesteps
batch_size bs train_batch_size
length context context_length seq_len sequence_length max_length block_size
folder out output output_dir out_dir dir
data prompt_file source dataset train_data file input text
device gpu cuda cpu
precision dtype bf16 fp16 amp
max_grad_norm clip grad_clip clip_grad gradient_clip
warmup_steps warmup warmup_iters
min_lr_ratio final_rate min_lr final_lr
betas beta1 beta2 adam_beta1 adam_beta2
weight_decay wd decay
micro_batch_size grad_accum gradient_accumulation gradient_accumulation_steps
activation_checkpointing gradient_checkpointing checkpointing
save_every save_interval save_steps checkpoint_every
keep_checkpoints keep save_total_limit
validate_every evaluate_every eval_every eval_interval eval_steps
env world environment env_id game
num_envs copies envs n_envs
gamma discount discount_factor
gae_lambda lambda lam trace
clip_range clip_ratio clip_coef clip_eps
entropy_coef ent_coef entropy_weight
value_coef vf_coef value_weight
rollout_steps rollout rollout_length
num_minibatches minibatches n_minibatches
hidden_sizes net_arch
buffer_size capacity replay_size
tau target_rate polyak
target_entropy_ratio entropy_share target_entropy target_entropy_scale
max_new_tokens tokens max_tokens num_tokens
num_return_sequences num_samples n
max_batch_size rows max_num_seqs
max_queue queue
prefill_chunk chunk chunk_size
store_dtype store_form
temperature temp
top_k top_n
workers num_workers processes jobs j
vocabulary model.vocab_size vocab vocabulary_size vocab_size
model.num_hidden_layers layers num_layers n_layer depth
model.num_heads heads n_head
model.hidden_size width dim d_model n_embd
"""
"""A line an option: what it is called here, by one command or another, and in other tools."""
SYNONYMS = {name: names.split() for names in SAME.strip().splitlines() for name in names.split()}
SYNONYMS |= {
    name: [f"model.{name}", *SYNONYMS.get(f"model.{name}", ())] for name in MODEL_FIELDS if name != "vocab_size"
}

ALIASES = {
    "lr": "learning_rate",
    "context_length": "length",
    "gradient_checkpointing": "activation_checkpointing",
}
"""Names of other tools that an option is taken by, too."""

ALIKE = 0.7
"""How alike two names must be for one to be proposed in the place of the other, from 0 to 1."""

WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "tuple": "values such as 0.9,0.95",
         "str": "text", "Path": "a path", "dict": "fields such as {name: value}", "NoneType": "null"}  # fmt: skip
"""By what Python calls a type: what to write for it."""


class Parser(ArgumentParser):
    """The options of one command. What it cannot read ends the program with a sentence on stderr and status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        self.exit(2, f"{self.prog}: {sentence(message, self.names())}; see {self.prog} --help\n")

    def names(self) -> list[str]:
        """Of all options, with a dot before a field of another one."""
        return list(self.get_defaults().keys())

    def format_help(self, *arguments: Any) -> str:
        shown = re.sub(r"<class\s+'(?:\w+\.)*(\w+)'>", r"\1", super().format_help(*arguments))
        return re.sub(r"--\w[\w.]*", lambda name: dashed(name[0]), shown)


def parser_of(command: Callable[..., None], prog: str) -> Parser:
    """A parser with an option for each argument of the function, explained by its docstring.

    A command with an attribute `more_options` has as many groups more: what they begin with, dataclasses, by name.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    needed = [
        name.upper()
        for name, argument in inspect.signature(command).parameters.items()
        if argument.default is argument.empty and argument.kind is not argument.VAR_KEYWORD
    ]
    parser = Parser(
        prog=prog,
        usage=" ".join([prog, *needed, "[options]"]),
        description=inspect.cleandoc(command.__doc__ or "").split("\n\nArgs:")[0],
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="a YAML or JSON file with options, a run's config.json, or the name of one that comes with hqlt: "
        + ", ".join(known_configs()),
    )
    parser.add_function_arguments(command, as_positional=True, as_group=False)
    for name, begins_with in getattr(command, "more_options", dict)().items():
        parser.add_argument(f"--{name}", type=type(begins_with), default=begins_with)
    return parser


def parse(parser: Parser, arguments: Sequence[str]) -> dict[str, Any]:
    """The function's arguments, by name. Raises ValueError or OSError for a file of options that cannot be read."""
    parsed = parser.parse_args(canonical(arguments, parser))
    try:
        options: dict[str, Any] = parser.instantiate(parsed).as_dict()
    except ValueError as error:  # a group of options that refuses one of them, such as --ppo.rollout
        name, colon, said = str(error).partition(":")
        raise ValueError(f"{dashed('--' + name)}:{said}" if colon and name in parser.names() else str(error)) from None
    del options["config"]
    return options


def canonical(arguments: Sequence[str], parser: Parser) -> list[str]:
    """The same arguments in the one form that the parser knows.

    --top-p 0.9             --top_p 0.9
    --greedy                --greedy=true
    --betas=0.9,0.99        --betas=[0.9,0.99]
    --as=llama              --as_=llama               (a word of Python's)
    --lr=0.001              --learning_rate=0.001     (ALIASES)
    --steps=3 --config=a    --config=a --steps=3      (the command line goes before a file, in whatever order)
    """
    defaults, known = parser.get_defaults(), parser.names()
    files: list[str] = []
    others: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            return [*files, *others, argument, *rest]
        if not argument.startswith("--"):
            others.append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = "--" + name[2:].replace("-", "_") + "_" * keyword.iskeyword(name[2:])
        if (alias := ALIASES.get(name[2:])) in known and name[2:] not in known:
            name = f"--{alias}"
        default = defaults.get(name[2:])
        if not equals and isinstance(default, bool):
            equals, value = "=", rest.pop(0) if rest[:1] in (["true"], ["false"]) else "true"
        if not equals and (name == "--config" or isinstance(default, tuple)):
            equals, value = ("=", rest.pop(0)) if rest else ("", "")
        if isinstance(default, tuple) and value[:1] not in ("[", "("):
            value = f"[{value}]" if equals else value
        if name == "--config" and equals:
            files.append(f"--config={options_in(value)}")
        else:
            others.append(name + equals + value)
    return [*files, *others]


def known_configs() -> dict[str, Path]:
    """The files of options that come with the library, by name."""
    folder = Path(str(resources.files("hqlt"))) / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def options_in(file: str) -> str:
    """A file of options as the parser takes it: its name; of a run's config.json, the settings in it as JSON.

    Raises ValueError or OSError for a file that is not there, or is not a mapping of options.
    """
    path = Path(file).expanduser()
    if not path.exists():
        path = known_configs().get(file, path)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--config: expected YAML or JSON in UTF-8 in {file}: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(given, dict):
        raise ValueError(f"--config: expected a line such as steps: 100 for each option in {file}, got {given!r:.60}")
    if "command" in given and isinstance(given.get("settings"), dict):
        return json.dumps(given["settings"])
    return str(path)


def sentence(message: str, names: Collection[str]) -> str:
    """What a parser says, in a line and in plain words, with the nearest right names."""
    line = " ".join(message.split())
    if (wrong_value := _about_a_value(line)) is not None:
        return wrong_value
    wrong = re.findall(r"(?<!\S)--([\w.-]+)", line if "nrecognized arguments" in line else "")
    wrong += re.findall(r"(?:accept option|Option) '([\w.]+)'", line)  # in a file
    near = [" or ".join(dashed(f"--{name}") for name in found) for found in (nearest(name, names) for name in wrong)]
    line = line.replace("unrecognized arguments:", "expected options of this command, got")
    line = re.sub(r'Parser key "([\w.]+)":', r"--\1:", line)
    line = re.sub(r"--\w[\w.]*", lambda name: dashed(name[0]), line)
    return f"{line} (did you mean {' and '.join(filter(None, near))}?)" if any(near) else line


def _about_a_value(line: str) -> str | None:
    """What to write for an option in the place of a value of the wrong type; None where this is not what is said."""
    found = re.fullmatch(r'Parser key "([\w.]+)": (.*?)(?:Got value|Given value type: .* Given value): (.*)', line)
    if found is None:
        return None
    key, expected, value = found.groups()
    kinds = sorted(set(re.findall(r"<class '(?:\w+\.)*(\w+)'>", expected)), key=lambda kind: kind == "NoneType")
    literal = re.search(r"Literal\[(.*?)\]", expected)
    wanted = literal[1].replace("'", "") if literal else " or ".join(WORDS.get(kind, kind) for kind in kinds)
    return f"{dashed('--' + key)}: expected {wanted}, got {value}" if wanted else None


def nearest(wrong: str, names: Collection[str]) -> list[str]:
    """The options that may have been meant: by a name in common, another tool's name, a beginning, a word, the letters.

    More than one where several algorithms have an option of that name. None where no name is near, because a wrong
    proposal is worse than none.
    """
    group, _, last = wrong.replace("-", "_").rpartition(".")
    within = [name for name in names if name.startswith(f"{group}.")] if group else names
    last_of = {name: name.rpartition(".")[2] for name in within}
    if not group and "model" in names:
        last_of |= {f"model.{field}": f"model.{field}" for field in MODEL_FIELDS}
    for wanted in (last, *SYNONYMS.get(last, ())):
        if found := [name for name, its in last_of.items() if its == wanted]:
            return found
    begun = [name for name, its in last_of.items() if len(last) > 2 and its.startswith(last)]
    words = [name for name, its in last_of.items() if _share_words(last, its)]
    for found in (begun, words):
        if len(found) == 1:
            return found
    synonyms = {word: name for word, ours in SYNONYMS.items() for name in last_of if name in ours}
    for its in difflib.get_close_matches(last, [*last_of.values(), *synonyms], n=1, cutoff=ALIKE):
        return [name for name, other in last_of.items() if other == its] or [synonyms[its]]
    return []


def _share_words(one: str, other: str) -> bool:
    """Whether most of the words of two names of several words are the same."""
    first, second = set(one.split("_")), set(other.split("_"))
    return min(len(first), len(second)) > 1 and len(first & second) * 2 > max(len(first), len(second))


def dashed(name: str) -> str:
    """As it is shown: --top-p for top_p, --as for as_."""
    return name.removesuffix("_").replace("_", "-")
