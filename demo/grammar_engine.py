"""Generate from, and parse with, the rules of :mod:`statement_grammar`. A derivation is kept as a small tree."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from statement_grammar import GRAMMAR


@dataclass(frozen=True)
class Node:
    """Rule number ``rule`` of ``symbol``; ``words`` holds the word chosen at each word position ("" for none)."""

    symbol: str
    rule: int
    words: tuple[str, ...]
    children: tuple[Node, ...]


@cache
def _tokens(pattern: str) -> tuple[str, ...]:
    return tuple(pattern.split())


def meaning(node: Node) -> Any:
    return GRAMMAR[node.symbol][node.rule][1](*map(meaning, node.children))


def text(node: Node) -> str:
    words, children, out = iter(node.words), iter(node.children), []
    for token in _tokens(GRAMMAR[node.symbol][node.rule][0]):
        out.append(text(next(children)) if token.startswith("<") else next(words))
    return " ".join(part for part in out if part).replace(" ,", ",")


@dataclass
class Weights:
    """How often each rule of a symbol, and each alternative at a word position, is used.

    ``rules`` is keyed by the symbol alone ("POST") and by the place it stands in ("SNP/0>POST", the parent's rule).
    """

    rules: dict[str, list[float]]
    words: dict[str, list[float]]


SURPRISE = 0.05  # how often a rule is drawn regardless of the place it stands in


def generate(rng: random.Random, weights: Weights, symbol: str = "S", parent: str = "") -> Node:
    place = f"{parent}>{symbol}"
    known = place in weights.rules and rng.random() >= SURPRISE
    rule = rng.choices(range(len(GRAMMAR[symbol])), weights.rules[place if known else symbol])[0]
    words, children = [], []
    for token in _tokens(GRAMMAR[symbol][rule][0]):
        if token.startswith("<"):
            children.append(generate(rng, weights, token[1:-1], f"{symbol}/{rule}"))
        else:
            options = token.split("|")
            key = f"{symbol}/{rule}/{len(words)}"
            word = rng.choices(options, weights.words[key])[0]
            words.append("" if word == "~" else word)
    return Node(symbol, rule, tuple(words), tuple(children))


def parse(sentence: str) -> Node | None:
    """The first derivation of the sentence, or None. Spelling must already be normal (see :func:`normal`)."""
    words = tuple(re.findall(r"[^\s,]+|,", sentence))
    memo: dict[tuple[str, int], list[tuple[int, Node]]] = {}

    def derive(symbol: str, start: int) -> list[tuple[int, Node]]:
        key = (symbol, start)
        if key not in memo:
            memo[key] = []
            found: dict[tuple[int, int], tuple[int, Node]] = {}
            for rule, (pattern, _) in enumerate(GRAMMAR[symbol]):
                for end, chosen, children in match(_tokens(pattern), start):
                    found.setdefault((rule, end), (end, Node(symbol, rule, chosen, children)))
            memo[key] = list(found.values())
        return memo[key]

    def match(tokens: tuple[str, ...], at: int) -> Iterator[tuple[int, tuple[str, ...], tuple[Node, ...]]]:
        if not tokens:
            yield at, (), ()
            return
        token, rest = tokens[0], tokens[1:]
        if token.startswith("<"):
            for end, node in derive(token[1:-1], at):
                for last, chosen, children in match(rest, end):
                    yield last, chosen, (node, *children)
            return
        for option in token.split("|"):
            if option == "~":
                for last, chosen, children in match(rest, at):
                    yield last, ("", *chosen), children
            elif at < len(words) and words[at] == option:
                for last, chosen, children in match(rest, at + 1):
                    yield last, (option, *chosen), children

    complete = [node for end, node in derive("S", 0) if end == len(words)]
    return complete[0] if complete else None


def _count_uses(node: Node, parent: str, rules: dict[str, Counter[int]], words: Counter[tuple[str, str]]) -> None:
    for key in (node.symbol, f"{parent}>{node.symbol}"):
        rules.setdefault(key, Counter())[node.rule] += 1
    for position, word in enumerate(node.words):
        words[f"{node.symbol}/{node.rule}/{position}", word or "~"] += 1
    for child in node.children:
        _count_uses(child, f"{node.symbol}/{node.rule}", rules, words)


def counted(nodes: list[Node]) -> dict[str, dict[str, dict[str, int]]]:
    """How often rules and words occur in derivations of real sentences, as plain JSON data for :func:`weighted`."""
    rules: dict[str, Counter[int]] = {}
    words: Counter[tuple[str, str]] = Counter()
    for node in nodes:
        _count_uses(node, "", rules, words)
    spoken: dict[str, dict[str, int]] = {}
    for (key, word), n in words.items():
        spoken.setdefault(key, {})[word] = n
    return {"rules": {k: {str(i): n for i, n in c.items()} for k, c in rules.items()}, "words": spoken}


def weighted(counts: dict[str, dict[str, dict[str, int]]], floor: float = 0.3) -> Weights:
    """Weights from counts; ``floor`` uses are granted to what never occurred, except where a place is known."""
    weights = Weights({}, {})
    for symbol, options in GRAMMAR.items():
        seen = counts["rules"].get(symbol, {})
        weights.rules[symbol] = [seen.get(str(i), 0) + floor for i in range(len(options))]
        for rule, (pattern, _) in enumerate(options):
            for position, token in enumerate(t for t in _tokens(pattern) if not t.startswith("<")):
                key = f"{symbol}/{rule}/{position}"
                used = counts["words"].get(key, {})
                weights.words[key] = [used.get(o, 0) + 0.1 * floor for o in token.split("|")]
    for key, seen in counts["rules"].items():
        if ">" in key:
            weights.rules[key] = [seen.get(str(i), 0) for i in range(len(GRAMMAR[key.split(">")[1]]))]
    return weights


FIXES: tuple[tuple[str, str], ...] = (
    (r"^ll ", "all "), (r"^t least", "at least"), (r"\btleast\b", "at least"), (r"\bble\b|\bb; ue\b", "blue"),
    (r"\b(exacrly|eactly|exacty|exacts)\b", "exactly"), (r"\b(lest|lease|leats)\b", "least"),
    (r"\bal least\b", "at least"),
    (r"\b(traingle|trianlge)", "triangle"), (r"\b(yelllow|yelow|yelloe)\b", "yellow"), (r"\b(sqaure|squere)", "square"),
    (r"\b(ciircle|cirlce)", "circle"), (r"\bthere (isa|s a)\b", "there is a"), (r"\b(egde|adge)\b", "edge"),
    (r"\bablue\b", "a blue"), (r"\babox\b", "a box"), (r"\b(wih|wirh|wwith)\b", "with"), (r"\bbkack\b", "black"),
    (r"\bod\b", "of"), (r"\bnealy\b", "nearly"), (r"^(the is|theer is|there ia|there opis)\b", "there is"),
    (r"^there a\b", "there is a"), (r"\bblicks\b", "blocks"),
    (r"\bthere box\b", "there is box"), (r"\bbow\b", "box"), (r"\bblue black\b", "blue block"), (r"\bgray\b", "grey"),
)  # fmt: skip


def normal(sentence: str) -> str:
    """Lower case, no final stop, known misspellings corrected: the form that :func:`parse` reads."""
    result = re.sub(r"\s+", " ", sentence.lower().replace(".", " ")).strip()
    for pattern, replacement in FIXES:
        result = re.sub(pattern, replacement, result)
    return result


def mutated(node: Node, rng: random.Random, weights: Weights, symbols: tuple[str, ...]) -> Node:
    """A copy in which one node among ``symbols`` is drawn again: the near miss of a statement."""
    places = list(_paths(node, lambda n: n.symbol in symbols))
    if not places:
        return node
    return _replaced(node, "", rng.choice(places), lambda old, parent: generate(rng, weights, old.symbol, parent))


def _paths(node: Node, wanted: Callable[[Node], bool], path: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    if wanted(node):
        yield path
    for index, child in enumerate(node.children):
        yield from _paths(child, wanted, (*path, index))


def _replaced(node: Node, parent: str, path: tuple[int, ...], new: Callable[[Node, str], Node]) -> Node:
    if not path:
        return new(node, parent)
    children = list(node.children)
    children[path[0]] = _replaced(children[path[0]], f"{node.symbol}/{node.rule}", path[1:], new)
    return Node(node.symbol, node.rule, node.words, tuple(children))
