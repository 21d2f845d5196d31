"""Whether Ray has placed the actors that a command waits for."""

from moray.batch.runtime.cluster_nodes import has_process


def test_an_actor_is_placed_once_it_has_a_process() -> None:
    waiting = {"Address": {"NodeID": "ab" * 28}, "Pid": 0}  # Ray has asked the node
    assert not has_process([]) and not has_process([waiting])
    assert has_process([waiting, waiting | {"Pid": 7}])
