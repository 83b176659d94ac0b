"""Memory that is left: the least of machine, container and limits, read from made-up files of the kernel."""

import resource

import pytest
import torch

from lightning_dp.gradients import free_memory as free

CPU = torch.device("cpu")
GB = 10**9


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 8 GiB left and 1 GiB of swap, no container, no limits."""
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text(
        "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\nSwapFree: 1048576 kB\nHugePages_Total: 0\n"
    )
    (tmp_path / "self" / "status").write_text("Name:\tpython\nVmSize: 2097152 kB\nVmData: 1048576 kB\n")
    monkeypatch.setattr(free, "_PROC", tmp_path)
    monkeypatch.setattr(free, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return tmp_path


def test_the_machine_counts_swap(machine):
    assert free.free_memory(CPU) == 9 * 2**30


def test_an_unknown_machine_says_nothing(machine):
    (machine / "meminfo").unlink()
    assert free.free_memory(CPU) is None
    assert free.free_memory(torch.device("meta")) is None


def test_a_container_is_smaller_and_its_cache_makes_room(machine):
    group = machine / "cgroup"
    group.mkdir()
    (group / "memory.max").write_text(f"{4 * GB}\n")
    (group / "memory.current").write_text(f"{3 * GB}\n")
    (group / "memory.stat").write_text(f"anon {2 * GB}\nactive_file {GB // 2}\ninactive_file {GB // 4}\n")
    assert free.free_memory(CPU) == GB + GB // 2 + GB // 4
    (group / "memory.max").write_text("max\n")
    assert free.free_memory(CPU) == 9 * 2**30


def test_ulimit_leaves_what_is_not_used(machine, monkeypatch):
    limits = {resource.RLIMIT_AS: 3 * 2**30, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], resource.RLIM_INFINITY))
    assert free.free_memory(CPU) == 2**30
    limits[resource.RLIMIT_DATA] = 2**30
    assert free.free_memory(CPU) == 0


@pytest.mark.skipif(free.free_memory(CPU) is None, reason="this system does not say what is free")
def test_a_network_beyond_what_is_free_fails_where_it_is_built(monkeypatch):
    monkeypatch.setattr(free, "free_memory", lambda device: 2**26)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(RuntimeError, match="can't allocate memory"), free.no_more_than_free():
        torch.empty(2**29, dtype=torch.uint8)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    torch.empty(2**27, dtype=torch.uint8)
