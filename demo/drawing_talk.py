"""Dialogues in which the assistant draws: what is asked for, in many wordings, and what is to be drawn.

A turn is `(question, reply, wish)`; where there is a wish the reply goes with its picture. The reply always says what is
drawn, so that the picture follows from words the assistant has written itself.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dialogues import Message, aside, pseudo_word, system_prompt, vary
from drawings import BACKGROUNDS, MOST_ITEMS, PLACES, Group, Wish, caption, held_out, wishes
from scene_model import COLORS, SHAPES
from scene_text import NUMBERS

Turn = tuple[str, str, Wish | None]

REQUESTS = (
    "Draw {}.", "Draw {}", "Draw me {}.", "Paint {}.", "Please draw {}.", "Can you draw {}?", "Could you draw {}?",
    "Show me {}.", "Make a picture of {}.", "Create an image of {}.", "I want to see {}.", "Draw a picture of {}.",
    "Generate a picture with {}.", "Give me a picture of {}.", "Please make an image of {}.", "I would like a picture of {}.",
    "A picture of {}, please.", "Paint me a picture with {}.", "Let me see {}.", "Sketch {}.",
)  # fmt: skip
HELD_OUT_REQUESTS = ("Please paint {}.", "Can you make a picture of {}?", "Create a picture with {}.")
UNDRAWABLE = (
    "cat", "dog", "person", "car", "tree", "house", "bird", "horse", "flower", "boat", "face", "robot", "mountain", "castle",
    "dragon", "landscape", "banana", "apple", "table", "computer", "portrait", "hexagon", "heart", "map", "sunset", "fish",
)  # fmt: skip
CANNOT_DRAW = "I can't draw {}. I can draw circles, squares, triangles, stars, crosses and diamonds."
AGAIN = ("Draw it again.", "Again please.", "Draw another one.", "One more like this.", "Show it once more.")


def reply(wish: Wish) -> str:
    return f"Here you go: {caption(wish)}."


def request(wish: Wish, rng: random.Random, unseen: bool = False) -> Turn:
    """Ask for a wish outright; ``unseen`` in a wording that no training has."""
    if unseen:
        return rng.choice(HELD_OUT_REQUESTS).format(caption(wish)), reply(wish), wish
    return vary(rng.choice(REQUESTS).format(caption(wish)), rng, 0.25), reply(wish), wish


def noun(group: Group, others: tuple[Group, ...]) -> str:
    """Words that mean this group among others: its shape or its colour where one is enough."""
    name = group.shape if group.count == 1 else replace(group, color="").words().split(maxsplit=1)[1].strip()
    if all(other.shape != group.shape for other in others):
        return f"the {name}"
    if all(other.color != group.color for other in others):
        return f"the {group.color} {'one' if group.count == 1 else 'ones'}"
    return f"the {group.color} {name}"


def edit(wish: Wish, rng: random.Random, test: bool = False) -> tuple[str, Wish] | None:
    """A change to what was drawn, in words, and the wish it leads to, of the training side or of the ``test`` side.

    None where the change that was hit on cannot be made.
    """
    index = rng.randrange(len(wish.groups))
    group, others = wish.groups[index], wish.groups[:index] + wish.groups[index + 1 :]
    named = noun(group, others)
    if not others and rng.random() < 0.4:
        named = "it" if group.count == 1 else "them"

    def swapped(new: Group) -> Wish:
        return replace(wish, groups=(*wish.groups[:index], new, *wish.groups[index + 1 :]))

    kind = rng.choice(("color", "color", "shape", "background", "remove", "add", "count", "place"))
    if kind == "color":
        color = rng.choice([c for c in COLORS if c not in (wish.background, group.color)])
        forms = ("Make {} {}.", "Now make {} {}.", "Change {} to {}.", "Paint {} {} instead.", "{} should be {}.")
        text = rng.choice(forms[:-1] if named == "them" else forms).format(named, color)
        after = swapped(replace(group, color=color))
    elif kind == "shape":
        shape = rng.choice([s for s in SHAPES if s != group.shape])
        after = swapped(replace(group, shape=shape))
        plural = after.groups[index].words().split()[2]
        text = rng.choice(("Turn {} into {}.", "Replace {} by {}.", "Change {} into {}.")).format(
            named, f"a {shape}" if group.count == 1 else plural
        )
    elif kind == "background":
        background = rng.choice([b for b in BACKGROUNDS if b != wish.background])
        if any(g.color == background for g in wish.groups):
            return None
        forms = ("On a {} background.", "Make the background {}.", "Now on a {} background, please.")
        text, after = rng.choice(forms).format(background), replace(wish, background=background)
    elif kind == "remove":
        if len(wish.groups) < 2:
            return None
        text = rng.choice(("Remove {}.", "Take {} away.", "Now without {}.")).format(named)
        after = replace(wish, groups=others, relation="")
    elif kind == "add":
        new = Group(1, rng.choice([c for c in COLORS if c != wish.background]), rng.choice(SHAPES))
        if wish.relation or len(wish.groups) > 2 or sum(g.count for g in wish.groups) >= MOST_ITEMS:
            return None
        text = rng.choice(("Add {}.", "Now add {}.", "Put {} there too.")).format(new.words())
        after = replace(wish, groups=(*wish.groups, new))
    elif kind == "count":
        if wish.relation or group.place:
            return None
        most = MOST_ITEMS if len(wish.groups) == 1 else 4 if len(wish.groups) == 2 else 2
        count = rng.choice([n for n in range(1, most + 1) if n != group.count])
        after = swapped(replace(group, count=count))
        text = rng.choice(("Now {} of {}.", "I want {} of {}.")).format(
            after.groups[index].words().split()[0].replace("an", "one") if count > 1 else "one", named
        )
    else:
        if not group.place:
            return None
        place = rng.choice([p for p in PLACES if p not in [g.place for g in wish.groups]])
        text, after = f"Put {named} {place}.", swapped(replace(group, place=place))
    kinds = [(g.color, g.shape) for g in after.groups]
    if len(set(kinds)) < len(kinds) or sum(g.count for g in after.groups) > MOST_ITEMS or held_out(after) != test:
        return None
    return text[0].upper() + text[1:], after


def count_question(wish: Wish, rng: random.Random) -> Turn:
    """A question about what was drawn, answered from the words alone."""
    group = rng.choice(wish.groups)
    same = sum(g.count for g in wish.groups if g.shape == group.shape)
    plural = replace(group, count=2, place="").words().split()[2]
    return f"How many {plural} did you draw?", NUMBERS[same], None


def beyond(rng: random.Random) -> Turn:
    """A request for something that the assistant cannot draw."""
    thing = rng.choice(UNDRAWABLE) if rng.random() < 0.5 else pseudo_word(rng)
    article = "an" if thing[0] in "aeiou" else "a"
    color = f"{rng.choice(tuple(COLORS))} " if rng.random() < 0.2 else ""
    asked = f"{'an' if color[:1] in tuple('aeiou') else 'a'} {color}{thing}" if color else f"{article} {thing}"
    return vary(rng.choice(REQUESTS).format(asked), rng, 0.25), CANNOT_DRAW.format(f"{article} {thing}"), None


def drawing_turns(rng: random.Random) -> list[Turn]:
    """One request and what follows from it: changes, repetitions, questions."""
    if rng.random() < 0.08:
        return [beyond(rng)]
    wish = wishes(rng, test=False)
    turns = [request(wish, rng)]
    while rng.random() < 0.6 and len(turns) < 5:
        roll = rng.random()
        if roll < 0.65:
            changed = edit(wish, rng)
            if changed is None:
                continue
            wish = changed[1]
            turns.append((vary(changed[0], rng, 0.2), reply(wish), wish))
        elif roll < 0.75:
            turns.append((rng.choice(AGAIN), reply(wish), wish))
        elif roll < 0.82:
            turns.append(count_question(wish, rng))
        elif roll < 0.9:
            turns.append((*aside(rng), None))
        else:
            wish = wishes(rng, test=False)
            turns.append(request(wish, rng))
    return turns


def changing_turns(rng: random.Random) -> list[Turn]:
    """One request and four changes, one after the other. Which group is meant has to be looked up in the reply before."""
    wish = wishes(rng, test=False)
    turns = [request(wish, rng)]
    while len(turns) < 5:
        if changed := edit(wish, rng):
            wish = changed[1]
            turns.append((vary(changed[0], rng, 0.2), reply(wish), wish))
        elif rng.random() < 0.05:  # hardly anything can be changed about some
            break
    return turns


def in_words(turns: Sequence[tuple[str, str, Any]], rng: random.Random) -> list[Message]:
    """The dialogue without its media: what the language model is trained on."""
    messages = system_prompt(rng)
    for question, answer, _ in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages
