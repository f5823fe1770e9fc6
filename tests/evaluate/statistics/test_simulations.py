"""The simulation behind docs/measurements.md runs; a few repetitions of it say nothing about its numbers."""

from tests.simulations import intervals


def test_the_simulation_prints_its_tables(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["intervals", "--repetitions", "2"])
    assert intervals.main() in (0, 1)
    printed = capsys.readouterr().out
    for title, columns, _ in intervals.TABLES.values():
        assert title in printed
        assert " | ".join(columns) in printed
    assert "miss their bar" in printed
