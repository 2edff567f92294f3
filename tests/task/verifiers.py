"""Independent computations of the tasks' answers, by Python's own `eval` and plain loops.

The verifiers of state-tracking tasks map the tokens of a sequence to the token of its answer; the others map them to
{position: answer}.
"""

import itertools

CHARACTERS = {1: "+", 2: "-", 3: "*", 10: "(", 11: ")"} | {5 + d: str(d) for d in range(5)}


def parity(tokens):
    ones = [token for token in tokens if token == 2]
    return 2 if len(ones) % 2 else 1


def even_pairs(tokens):
    text = "".join(" ab"[token] for token in tokens)
    pairs = sum(text[i : i + 2] in ("ab", "ba") for i in range(len(text)))
    return 2 if pairs % 2 else 1


def cycle(tokens):
    position = 0
    for token in tokens:
        if token == 2:
            position = 0 if position == 5 else position + 1
        elif token == 3:
            position = 5 if position == 0 else position - 1
    return 4 + position


def expression(tokens):
    """The expression before the `=`, or up to the last digit."""
    text = "".join(CHARACTERS[token] for token in tokens if token != 4)
    return text.rstrip("+-*")


def arithmetic(tokens):
    return 5 + eval(expression(tokens)) % 5


def permutations_of(group):
    """The verifier of a group, which applies the elements one after the other to a row of letters."""
    letters = "abcde"[: int(group[1])]
    elements = [p for p in itertools.permutations(range(len(letters))) if group[0] == "S" or swaps(p) % 2 == 0]

    def answer(tokens):
        where = list(range(len(letters)))  # place of each letter
        for token in tokens:
            where = [elements[token - 1][place] for place in where]
        return 1 + elements.index(tuple(where))

    return answer


def swaps(p):
    """Number of swaps that sort p."""
    p, n = list(p), 0
    for i in range(len(p)):
        while p[i] != i:
            j = p[i]
            p[i], p[j] = p[j], p[i]
            n += 1
    return n


def state_recall(tokens, switches, symbols):
    """{position: answer}, found by going through the tokens one by one."""
    m = 2**switches
    on, value_of, key, found = [False] * switches, {}, None, {}
    for i, token in enumerate(tokens):
        if 1 <= token <= m:  # a flip of the switches that are the binary digits of token − 1
            for switch in range(switches):
                if (token - 1) // 2**switch % 2:
                    on[switch] = not on[switch]
        elif m < token <= m + symbols:
            setting = sum(is_on * 2**switch for switch, is_on in enumerate(on))
            found[i] = value_of[token - 1 - m, setting]
        elif m + symbols < token <= m + symbols + m * symbols:
            key = divmod(token - 1 - m - symbols, m)
        elif token:
            value_of[key] = token
    return found


def recall(tokens, half=4096):
    """{position of a query: value}; the pairs come first, as many as there are values."""
    pairs = sum(token >= half for token in tokens)
    value_of = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
    return {i: value_of[token] for i, token in enumerate(tokens) if i >= 2 * pairs and token}


def selective_copying(tokens):
    kept = [token for token in tokens if token > 1]
    return dict(zip([i for i, token in enumerate(tokens) if token == 1], kept, strict=True))


def needles(tokens, keys=16):
    """{position of a query: value}; a query is a key that 0 follows."""
    queries = [i for i, token in enumerate(tokens[:-1]) if 1 <= token <= keys and tokens[i + 1] == 0]
    return {i: tokens[tokens.index(tokens[i]) + 1] for i in queries}
