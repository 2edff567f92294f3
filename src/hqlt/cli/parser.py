"""The parser of a command, built from the arguments of its function, with readable error messages."""

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
SYNONYM_TABLE = """
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
"""One line per option: its name here (several, if commands differ), then its names in other tools."""
SYNONYMS = {name: names.split() for names in SYNONYM_TABLE.strip().splitlines() for name in names.split()}
SYNONYMS |= {
    name: [f"model.{name}", *SYNONYMS.get(f"model.{name}", ())] for name in MODEL_FIELDS if name != "vocab_size"
}

ALIASES = {
    "lr": "learning_rate",
    "context_length": "length",
    "gradient_checkpointing": "activation_checkpointing",
}
"""Names of other tools that are accepted for an option."""

MIN_SIMILARITY = 0.7
"""Minimum similarity of a name, from 0 to 1, to be suggested instead of a misspelled one."""

TYPE_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "tuple": "values such as 0.9,0.95",
         "str": "text", "Path": "a path", "dict": "fields such as {name: value}", "NoneType": "null"}  # fmt: skip
"""How error messages describe the values of a Python type."""


class Parser(ArgumentParser):
    """The parser of one command. For invalid options it prints one sentence to stderr and exits with status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        self.exit(2, f"{self.prog}: {readable(message, self.names())}; see {self.prog} --help\n")

    def names(self) -> list[str]:
        """The names of all options, with dots for fields of nested options."""
        return list(self.get_defaults().keys())

    def format_help(self, *arguments: Any) -> str:
        shown = re.sub(r"<class\s+'(?:\w+\.)*(\w+)'>", r"\1", super().format_help(*arguments))
        return re.sub(r"--\w[\w.]*", lambda name: dashed(name[0]), shown)


def parser_of(command: Callable[..., None], prog: str) -> Parser:
    """A parser with an option for each argument of the function, with help from its docstring.

    A command may have an attribute `more_options`, a function that returns further groups of options: default values
    (dataclasses) by name.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    required = [
        name.upper()
        for name, argument in inspect.signature(command).parameters.items()
        if argument.default is argument.empty and argument.kind is not argument.VAR_KEYWORD
    ]
    parser = Parser(
        prog=prog,
        usage=" ".join([prog, *required, "[options]"]),
        description=inspect.cleandoc(command.__doc__ or "").split("\n\nArgs:")[0],
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="a YAML or JSON file with options, a run's config.json, or the name of a config that hqlt includes: "
        + ", ".join(known_configs()),
    )
    parser.add_function_arguments(command, as_positional=True, as_group=False)
    for name, default in getattr(command, "more_options", dict)().items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser


def parse(parser: Parser, arguments: Sequence[str]) -> dict[str, Any]:
    """The function's arguments by name. Raises ValueError or OSError if a config file cannot be read."""
    parsed = parser.parse_args(canonical(arguments, parser))
    try:
        options: dict[str, Any] = parser.instantiate(parsed).as_dict()
    except ValueError as error:  # from a group of options, such as --ppo.rollout_steps
        name, colon, message = str(error).partition(":")
        raise ValueError(
            f"{dashed('--' + name)}:{message}" if colon and name in parser.names() else str(error)
        ) from None
    del options["config"]
    return options


def canonical(arguments: Sequence[str], parser: Parser) -> list[str]:
    """The arguments in the form that the parser understands.

    --top-p 0.9             --top_p 0.9
    --greedy                --greedy=true
    --betas=0.9,0.99        --betas=[0.9,0.99]
    --as=llama              --as_=llama               (a Python keyword)
    --lr=0.001              --learning_rate=0.001     (ALIASES)
    --steps=3 --config=a    --config=a --steps=3      (the command line overrides files, in any order)
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
    """The config files that the library includes, by name."""
    folder = Path(str(resources.files("hqlt"))) / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def options_in(file: str) -> str:
    """A config file in the form that the parser accepts: its path, or the settings in a run's config.json as JSON.

    Raises ValueError or OSError if the file does not exist or is not a mapping of options.
    """
    path = Path(file).expanduser()
    if not path.exists():
        path = known_configs().get(file, path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--config: expected YAML or JSON in UTF-8 in {file}: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"--config: expected lines such as steps: 100, one per option, in {file}, got {content!r:.60}")
    if "command" in content and isinstance(content.get("settings"), dict):
        return json.dumps(content["settings"])
    return str(path)


def readable(message: str, names: Collection[str]) -> str:
    """An error message of the parser as one readable line, with suggestions for misspelled names."""
    line = " ".join(message.split())
    if (wrong_value := _invalid_value(line)) is not None:
        return wrong_value
    wrong = re.findall(r"(?<!\S)--([\w.-]+)", line if "nrecognized arguments" in line else "")
    wrong += re.findall(r"(?:accept option|Option) '([\w.]+)'", line)  # in a config file
    near = [" or ".join(dashed(f"--{name}") for name in found) for found in (nearest(name, names) for name in wrong)]
    line = line.replace("unrecognized arguments:", "expected options of this command, got")
    line = re.sub(r'Parser key "([\w.]+)":', r"--\1:", line)
    line = re.sub(r"--\w[\w.]*", lambda name: dashed(name[0]), line)
    return f"{line} (did you mean {' and '.join(filter(None, near))}?)" if any(near) else line


def _invalid_value(line: str) -> str | None:
    """The message for a value of the wrong type; None if the error is another one."""
    found = re.fullmatch(r'Parser key "([\w.]+)": (.*?)(?:Got value|Given value type: .* Given value): (.*)', line)
    if found is None:
        return None
    key, expected, value = found.groups()
    kinds = sorted(set(re.findall(r"<class '(?:\w+\.)*(\w+)'>", expected)), key=lambda kind: kind == "NoneType")
    literal = re.search(r"Literal\[(.*?)\]", expected)
    wanted = literal[1].replace("'", "") if literal else " or ".join(TYPE_NAMES.get(kind, kind) for kind in kinds)
    return f"{dashed('--' + key)}: expected {wanted}, got {value}" if wanted else None


def nearest(wrong: str, names: Collection[str]) -> list[str]:
    """Suggestions for a misspelled option: by last name, synonym, prefix, common words or similar spelling.

    There are several if several groups have an option of that name, and none if no name is similar, because a wrong
    suggestion is worse than none.
    """
    group, _, last = wrong.replace("-", "_").rpartition(".")
    within = [name for name in names if name.startswith(f"{group}.")] if group else names
    last_names = {name: name.rpartition(".")[2] for name in within}
    if not group and "model" in names:
        last_names |= {f"model.{field}": f"model.{field}" for field in MODEL_FIELDS}
    for wanted in (last, *SYNONYMS.get(last, ())):
        if found := [name for name, its in last_names.items() if its == wanted]:
            return found
    prefixed = [name for name, its in last_names.items() if len(last) > 2 and its.startswith(last)]
    words = [name for name, its in last_names.items() if _share_words(last, its)]
    for found in (prefixed, words):
        if len(found) == 1:
            return found
    synonyms = {word: name for word, ours in SYNONYMS.items() for name in last_names if name in ours}
    for its in difflib.get_close_matches(last, [*last_names.values(), *synonyms], n=1, cutoff=MIN_SIMILARITY):
        return [name for name, other in last_names.items() if other == its] or [synonyms[its]]
    return []


def _share_words(one: str, other: str) -> bool:
    """Whether two names of several words have most of their words in common."""
    first, second = set(one.split("_")), set(other.split("_"))
    return min(len(first), len(second)) > 1 and len(first & second) * 2 > max(len(first), len(second))


def dashed(name: str) -> str:
    """The name as shown to the user: --top-p for top_p, --as for as_."""
    return name.removesuffix("_").replace("_", "-")
