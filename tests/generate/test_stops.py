"""A stop string ends a text wherever its tokens are cut, and nothing that may be part of one is shown too early."""

import random

from aurora_train.generate.stops import Stops


def test_a_text_ends_before_its_first_stop_string_however_it_is_cut_into_pieces():
    text, draw = "ein Bär — und nochmal: ### Frage\nAntwort ##ENDE danach\n\nUser", random.Random(0)
    for stops in (["##ENDE"], ["\n\n", "\nUser"], ["####", "— u", "ö"], ["###", "##"], ["mal:", "a"], ["fehlt"], []):
        found = ((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop and stop in text)
        _, first = min(found, default=(None, len(text)))  # the one that is complete first
        for _ in range(50):
            watched, shown, at = Stops(stops), "", 0
            while at < len(text):
                size = draw.randint(1, 9)
                shown += watched.add(text[at : at + size])
                at += size
                assert text[:first].startswith(shown)
            shown += watched.rest()
            assert shown == text[:first]
            assert (watched.found is None) == (first == len(text))


def test_only_what_may_become_a_stop_string_is_held_back():
    watched = Stops(["<end>"])
    assert watched.add("a <e") == "a " and watched.add("n") == ""
    assert watched.add("x <") == "<enx " and watched.rest() == "<"
