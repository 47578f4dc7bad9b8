"""Dialogues in which the assistant speaks and plays sounds: what is asked for, in many wordings, and what is to be heard.

A turn is `(question, reply, wish)`; where there is a wish the reply goes with its sound. As in `drawing_talk`, the reply
always says what is heard.
"""

from __future__ import annotations

import random
from dataclasses import replace

from audio_windows import DIGITS
from dialogues import aside, vary
from sound_wishes import MOST_DIGITS, SoundWish, caption, held_out, wishes
from sounds import NUMBERS, PITCHES

Turn = tuple[str, str, SoundWish | None]

SPEECH = (
    "Say {}.", "Say {}", "Please say {}.", "Can you say {}?", "Could you say {}?", "Say {} for me.", "Speak: {}.",
    "Say {} aloud.", "Say it aloud: {}.", "Read {} aloud.", "Pronounce {}.", "Let me hear you say {}.", "I want to hear {}.",
    "Speak the digits {}.", "Say the word {}.", "Say: {}.", "Please speak: {}.", "Can you speak {}?",
    "Say the number {}.", "Say the digit {}.", "Speak {} for me.", "Please pronounce {}.", "Can you pronounce {}?", "Call out {}.",
    "Read {} out.", "Read out: {}.", "Read this aloud: {}.", "How do you say {}?", "I'd like to hear {}.",
    "Please let me hear {}.", "Tell me {} with your voice.", "Say {} out loud.", "Now say {}.",
    "Could you please say {}?", "Could you say: {}?", "Voice: {}.", "Let's hear {}.", "Announce {}.", "Make me hear {}.",
)  # fmt: skip
HELD_OUT_SPEECH = ("Please read {} aloud.", "Could you speak: {}?", "I want to hear you say {}.")
SOUNDS = (
    "Play {}.", "Play {}", "Play me {}.", "Please play {}.", "Can you play {}?", "Make the sound of {}.", "Let me hear {}.",
    "I want to hear {}.", "Make {}.", "What does {} sound like?", "Give me the sound of {}.", "Could you play {}?",
    "Create the sound of {}.", "A sound of {}, please.", "Please let me hear {}.", "Could you make the sound of {}?",
    "Now play {}.",
    "Can I hear {}?", "I would like to hear {}.", "Let me hear the sound of {}.", "Produce {}.", "Let's hear {}.",
    "Can you make {}?", "I want the sound of {}.", "Play the sound of {}.", "Sound of {}.", "Could I listen to {}?",
)  # fmt: skip
HELD_OUT_SOUNDS = ("Please make the sound of {}.", "Let me listen to {}.", "Can you create the sound of {}?")
AGAIN = (
    "Again.",
    "Again, please.",
    "Once more.",
    "Play it again.",
    "Let me hear it again.",
    "One more time.",
    "Repeat that.",
)
ECHO = (
    "Repeat what you hear.",
    "Play this sound again.",
    "Make the same sound.",
    "Play what you hear.",
    "Imitate this.",
)
ECHO_SPEECH = ("Repeat what you hear.", "Say what you hear.", "Say the same.", "Repeat this digit.", "Say that too.")
SAY_COUNT = ("Say how many {} there are.", "Count the {} and say the number.", "How many {} are there? Say it aloud.")
BOTH = ("{} Then {}", "{} And {}", "{} Also {}")


UNPLAYABLE = (
    "a song", "music", "a piano", "a guitar", "a violin", "a melody", "a speech", "a poem", "a cat", "a lion", "a cow",
    "a car", "a train", "the wind", "a waltz", "a choir", "a phone call", "a joke", "applause", "a trumpet",
)  # fmt: skip
CANNOT_PLAY = (
    "I can't play {}. I can say digits and play beeps, sweeps, noise, sirens, clicks, chirps, drums, bells and buzzes."
)


def reply(wish: SoundWish) -> str:
    return f"Listen: {caption(wish)}."


def named(wish: SoundWish, rng: random.Random) -> str:
    """What a request calls it: digits as words or as numerals, sounds by their caption."""
    if not wish.digits:
        return caption(wish)
    words = wish.digits if rng.random() < 0.7 else tuple(str(DIGITS.index(digit)) for digit in wish.digits)
    return " ".join(words)


def request(wish: SoundWish, rng: random.Random, unseen: bool = False) -> Turn:
    """Ask for a wish outright; ``unseen`` in a wording that no training has."""
    if unseen:
        return (
            rng.choice(HELD_OUT_SPEECH if wish.digits else HELD_OUT_SOUNDS).format(named(wish, rng)),
            reply(wish),
            wish,
        )
    asked = rng.choice(SPEECH if wish.digits else SOUNDS).format(named(wish, rng))
    return vary(asked, rng, 0.25), reply(wish), wish


def edit(wish: SoundWish, rng: random.Random) -> tuple[str, SoundWish] | None:
    """A change to what was heard, in words, and the wish it leads to; None where this one cannot be made."""
    sound = wish.sound
    if sound is None:
        digits = tuple(rng.choices(DIGITS, k=rng.choice((1, 1, 2))))
        if rng.random() < 0.3 and len(wish.digits + digits) <= MOST_DIGITS:
            text, after = f"Now say {' '.join(wish.digits + digits)}.", SoundWish(wish.digits + digits)
        else:
            text, after = rng.choice(("Now {}.", "And {}.", "Now say {}.")).format(" ".join(digits)), SoundWish(digits)
        return None if held_out(after) else (text, after)
    changes: list[tuple[str, SoundWish]] = []
    if sound.loudness:
        other = "quiet" if sound.loudness == "loud" else "loud"
        changes.append(
            (f"Make it {'quieter' if other == 'quiet' else 'louder'}.", SoundWish(sound=replace(sound, loudness=other)))
        )
    if sound.count:
        count = rng.choice([n for n in range(1, 7) if n != sound.count])
        changes.append((f"Now {NUMBERS[count - 1]} of them.", SoundWish(sound=replace(sound, count=count))))
    if sound.pitch:
        pitch = rng.choice([name for name in PITCHES if name != sound.pitch])
        changes.append((f"Now with a {pitch} pitch.", SoundWish(sound=replace(sound, pitch=pitch))))
    if sound.direction:
        other = "falling" if sound.direction == "rising" else "rising"
        changes.append((f"Now {other}.", SoundWish(sound=replace(sound, direction=other))))
    if sound.duration:
        other = "long" if sound.duration == "short" else "short"
        changes.append((f"Make it {other}er.", SoundWish(sound=replace(sound, duration=other))))
    if sound.speed:
        other = "fast" if sound.speed == "slow" else "slow"
        changes.append((f"Make it {other}er.", SoundWish(sound=replace(sound, speed=other))))
    if sound.parts:
        changes.append(("The other way round.", SoundWish(sound=replace(sound, parts=sound.parts[::-1]))))
    changes = [change for change in changes if not held_out(change[1])]
    return rng.choice(changes) if changes else None


def beyond(rng: random.Random) -> Turn:
    """A request for something that the assistant cannot play."""
    thing = rng.choice(UNPLAYABLE)
    return vary(rng.choice(SOUNDS).format(thing), rng, 0.25), CANNOT_PLAY.format(thing), None


def sound_turns(rng: random.Random) -> list[Turn]:
    """One request and what follows from it: changes, repetitions, other requests."""
    if rng.random() < 0.06:
        return [beyond(rng)]
    wish = wishes(rng, test=False)
    turns = [request(wish, rng)]
    while rng.random() < 0.6 and len(turns) < 5:
        roll = rng.random()
        if roll < 0.5:
            changed = edit(wish, rng)
            if changed is None:
                continue
            wish = changed[1]
            turns.append((vary(changed[0], rng, 0.2), reply(wish), wish))
        elif roll < 0.62:
            turns.append((rng.choice(AGAIN), reply(wish), wish))
        elif roll < 0.7:
            turns.append((*aside(rng), None))
        else:
            wish = wishes(rng, test=False)
            turns.append(request(wish, rng))
    return turns
