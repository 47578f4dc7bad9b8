"""Dialogues in which the assistant animates: what is asked for, in many wordings, and what is to be seen.

Turns as in `drawing_talk`: `(question, reply, motion)`; where there is a motion the reply goes with its clip, and says what
it shows.
"""

from __future__ import annotations

import random
from dataclasses import replace

from dialogues import aside, pseudo_word, vary
from drawing_talk import UNDRAWABLE
from drawings import BACKGROUNDS, Group, Wish
from moving import DIRECTIONS, MOVES, PACES, WAYS, Motion, caption, held_out, motions, moving
from scene_model import COLORS, SHAPES

Turn = tuple[str, str, Motion | None]

REQUESTS = (
    "Animate {}.", "Animate {}", "Make a clip of {}.", "Please animate {}.", "Can you animate {}?", "Could you animate {}?",
    "Make a video of {}.", "Create a clip of {}.", "Show me {}.", "I want to see {}.", "Make a short film of {}.",
    "Generate a clip of {}.", "Give me a clip of {}.", "Please make a video of {}.", "I would like a clip of {}.",
    "A clip of {}, please.", "Make an animation of {}.", "Let me see {}.", "Film {}.", "Show {}.",
)  # fmt: skip
HELD_OUT_REQUESTS = ("Please make a clip of {}.", "Can you make a video of {}?", "Create an animation of {}.")
CANNOT_ANIMATE = "I can't animate {}. I can move circles, squares, triangles, stars, crosses and diamonds."
WHICH_MOVE = ("Animate {}.", "Make a clip of {}.", "Make a video of {}.")
AGAIN = ("Play it again.", "Again please.", "Show it again.", "Animate it again.", "Once more.", "One more like this.")


def reply(motion: Motion) -> str:
    return f"Here you go: {caption(motion)}."


def request(motion: Motion, rng: random.Random, unseen: bool = False) -> Turn:
    """Ask for a motion outright; ``unseen`` in a wording that no training has."""
    if unseen:
        return rng.choice(HELD_OUT_REQUESTS).format(caption(motion)), reply(motion), motion
    return vary(rng.choice(REQUESTS).format(caption(motion)), rng, 0.25), reply(motion), motion


def edit(motion: Motion, rng: random.Random) -> tuple[str, Motion] | None:
    """A change to what was shown, in words, and the motion it leads to; None where this one cannot be made."""
    way, back, _ = motion.move.partition(" and back")
    kind = rng.choice(("move", "move", "move", "color", "color", "shape", "background", "pace", "back"))
    if kind == "move":
        move = rng.choice([move for move in MOVES if move != motion.move])
        after = replace(motion, move=move, pace=motion.pace if move in DIRECTIONS else "")
        if move in DIRECTIONS and motion.move in DIRECTIONS:
            forms = (
                "Now {}.",
                "Now {} please.",
                "{} instead.",
                "And now {}.",
                "Move it {}.",
                "It should move {}.",
                "{}",
            )
            text = rng.choice(forms).format(WAYS[move])
        else:
            verb = {"growing": "grow", "shrinking": "shrink"}.get(move, moving(move).replace("moving", "move", 1))
            text = rng.choice(("Let it {}.", "Now let it {}.", "Make it {}.", "It should {}.")).format(verb)
    elif kind == "color":
        color = rng.choice([c for c in COLORS if c not in (motion.background, motion.color)])
        forms = ("Make it {}.", "Now make it {}.", "Now in {}.", "Change the colour to {}.", "The {} should be {}.")
        form = rng.choice(forms)
        text = form.format(motion.shape, color) if "should" in form else form.format(color)
        after = replace(motion, color=color)
    elif kind == "shape":
        shape = rng.choice([s for s in SHAPES if s != motion.shape])
        forms = ("Now with a {}.", "Turn it into a {}.", "Make it a {}.", "A {} instead.", "Do the same with a {}.")
        text, after = rng.choice(forms).format(shape), replace(motion, shape=shape)
    elif kind == "background":
        background = rng.choice([b for b in BACKGROUNDS if b not in (motion.background, motion.color)])
        forms = ("On a {} background.", "Make the background {}.", "Now on a {} background, please.")
        text, after = rng.choice(forms).format(background), replace(motion, background=background)
    elif kind == "pace":
        if motion.move not in DIRECTIONS:
            return None
        pace = rng.choice([p for p in PACES[1:] if p != motion.pace])
        forms = {
            "slowly": ("Slower.", "Slower please.", "More slowly."),
            "quickly": ("Faster.", "Faster please.", "Quicker."),
        }
        text, after = rng.choice((*forms[pace], f"Now {pace}.")), replace(motion, pace=pace)
    else:
        if way not in DIRECTIONS:
            return None
        after = replace(motion, move=way if back else f"{way} and back", pace="")
        text = rng.choice(
            ("And not back.", "Without coming back.") if back else ("And back.", "And back again.", "Then back.")
        )
    return None if held_out(after) else (text[0].upper() + text[1:], after)


def beyond(rng: random.Random) -> Turn:
    """A request for something that the assistant cannot animate."""
    thing = rng.choice(UNDRAWABLE) if rng.random() < 0.5 else pseudo_word(rng)
    article = "an" if thing[0] in "aeiou" else "a"
    move = rng.choice(("", *(f" {moving(move)}" for move in MOVES)))
    # "Show me a cat" asks for a picture: without a move the words have to name the clip.
    asked = rng.choice(REQUESTS if move else WHICH_MOVE).format(f"{article} {thing}{move}")
    return vary(asked, rng, 0.25), CANNOT_ANIMATE.format(f"{article} {thing}"), None


def moving_turns(rng: random.Random, motion: Motion | None = None) -> list[Turn]:
    """One request and what follows from it: changes, repetitions; without the request when ``motion`` is there already."""
    turns: list[Turn] = []
    if motion is None:
        if rng.random() < 0.08:
            return [beyond(rng)]
        motion = motions(rng, test=False)
        turns.append(request(motion, rng))
    while len(turns) < 5 and (not turns or rng.random() < 0.6):
        roll = rng.random()
        if roll < 0.75:
            changed = edit(motion, rng)
            if changed is None:
                continue
            motion = changed[1]
            turns.append((vary(changed[0], rng, 0.2), reply(motion), motion))
        elif roll < 0.85:
            turns.append((rng.choice(AGAIN), reply(motion), motion))
        elif roll < 0.92:
            turns.append((*aside(rng), None))
        else:
            motion = motions(rng, test=False)
            turns.append(request(motion, rng))
    return turns


def set_moving(wish: Wish, rng: random.Random) -> tuple[str, Motion] | None:
    """A drawing of one shape is set in motion: the words, and the motion; None where there are more, or it is held out."""
    if len(wish.groups) > 1 or wish.groups[0].count > 1:
        return None
    group, move = wish.groups[0], rng.choice(MOVES)
    motion = Motion(group.shape, group.color, move, "", wish.background)
    forms = (
        "Animate it: it is {}.",
        "Now a clip of it {}.",
        "Make a clip of it {}.",
        "Show it {}.",
        "Now animate it {}.",
    )
    return None if held_out(motion) else (rng.choice(forms).format(moving(move)), motion)


def still(motion: Motion) -> Wish:
    """The drawing of what moves in a clip."""
    return Wish((Group(1, motion.color, motion.shape),), "", motion.background)
