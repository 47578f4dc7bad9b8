"""Everything about procedural scenes in one place: sample, draw, caption, describe, ask."""

from scene_model import Item, Scene, box_items, render, sample_scene, scene_from_nlvr, size_name, walls
from scene_questions import TYPES, questions
from scene_text import caption, describe, part_captions, summary

__all__ = [
    "TYPES", "Item", "Scene", "box_items", "caption", "describe", "part_captions", "questions", "render",
    "sample_scene", "scene_from_nlvr", "size_name", "summary", "walls",
]  # fmt: skip
