from moray.batch.ledger import Command
from moray.batch.runtime.admission_gate import AdmissionGate


def test_shards_are_admitted_until_there_is_a_command() -> None:
    gate = AdmissionGate()
    assert gate.is_open and gate.admit(4) and gate.admit(3)
    assert gate.admitted is None, "more may be admitted"
    gate.command = Command.DRAIN
    assert not gate.is_open and not gate.admit(5)
    assert gate.admitted == [3, 4]
