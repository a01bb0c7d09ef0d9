"""A stage tells its watcher where it stands; without one there is only the bar."""

from tasks.progress import stage_bar, watched_by


def test_a_watcher_hears_of_each_stage_of_its_block() -> None:
    heard: list[tuple[object, ...]] = []

    def watcher(stage: str, place: str):  # type: ignore[no-untyped-def]
        heard.append((stage, place))
        return lambda *told: heard.append(told)

    with watched_by(watcher), stage_bar("comparing", "session 1 epoch 0", "answer") as at:
        at("captions", 1, 4)
        at("judgements", 1, 2)
    with stage_bar("tuning", "session 1 epoch 0", "update", 2) as at:
        at("", 2, 2)
    assert heard == [("comparing", "session 1 epoch 0"), ("captions", 1, 4), ("judgements", 1, 2)]
