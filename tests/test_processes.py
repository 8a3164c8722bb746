"""What the processes of a run tell each other, against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing

from agents.meter import Meter, motion_lift
from tats_env.guard import GuardedOptimizer
from tats_env.processes import average, gathered, num_processes, process_index

COUNT = 2


def numbers(process: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(process).normal(size=shape).astype(np.float32)


def in_each_process(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=index, world_size=COUNT)
    found = [torch.from_numpy(numbers(index, *shape)) for shape in ((4, 3), (), (2, 1, 5))]
    # Rows that do not lie one after another
    turned = found[0].t()
    average(turned, *found[1:])
    # Each process has seen as many steps, but not as much foreground
    meter = Meter()
    for step in range(2):
        x = torch.from_numpy(numbers(10 * step + index, 2).__abs__())
        meter.add({"mean": x[0], "ratio": (x[0], x[1])})
    weight = torch.nn.Parameter(torch.from_numpy(numbers(7, 4)))
    guard = GuardedOptimizer(torch.optim.AdamW([weight], lr=0.1, fused=True), [weight])
    broken = []
    for scale in (1.0, float("nan") if index == 1 else 1.0):
        guard.accumulate((weight * scale * torch.from_numpy(numbers(index, 4))).sum())
        broken.append(bool(guard.step()[1]))
    torch.save(
        {
            "processes": (num_processes(), process_index()),
            "average": [turned.t(), *found[1:]],
            "gathered": gathered(torch.from_numpy(numbers(index, 2, 3)).t()),
            "meter": meter.means(),
            "weight": weight.detach(),
            "broken": broken,
        },
        f"{folder}/{index}.pt",
    )
    distributed.destroy_process_group()
    assert (num_processes(), process_index()) == (1, 0)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(in_each_process, (str(folder),), nprocs=COUNT)
    return [torch.load(Path(folder) / f"{index}.pt") for index in range(COUNT)]


def test_each_process_knows_how_many_there_are_and_which_it_is(told: list[dict]) -> None:
    assert [found["processes"] for found in told] == [(COUNT, index) for index in range(COUNT)]


def test_average_is_the_mean_over_the_processes_for_tensors_of_any_shape(told: list[dict]) -> None:
    for i, shape in enumerate(((4, 3), (), (2, 1, 5))):
        expected = np.mean([numbers(index, *shape) for index in range(COUNT)], axis=0)
        for found in told:
            np.testing.assert_allclose(found["average"][i].numpy(), expected, rtol=1e-5, atol=1e-7)


def test_gathered_has_the_rows_of_all_processes_in_their_order(told: list[dict]) -> None:
    expected = np.concatenate([numbers(index, 2, 3).T for index in range(COUNT)])
    for found in told:
        np.testing.assert_array_equal(found["gathered"].numpy(), expected)


def test_a_meter_averages_over_steps_and_processes_and_ratios_as_a_whole(told: list[dict]) -> None:
    seen = np.abs([numbers(10 * step + index, 2) for step in range(2) for index in range(COUNT)])
    for found in told:
        assert found["meter"]["mean"] == pytest.approx(seen[:, 0].mean(), rel=1e-5)
        assert found["meter"]["ratio"] == pytest.approx(seen[:, 0].sum() / seen[:, 1].sum(), rel=1e-5)


def test_an_optimiser_takes_the_mean_gradient_s_step_and_all_leave_out_what_is_broken_in_one(told: list[dict]) -> None:
    weight = torch.nn.Parameter(torch.from_numpy(numbers(7, 4)))
    weight.grad = torch.from_numpy(np.mean([numbers(index, 4) for index in range(COUNT)], axis=0))
    torch.optim.AdamW([weight], lr=0.1).step()
    for found in told:
        torch.testing.assert_close(found["weight"], weight.detach())
        assert found["broken"] == [False, True]


def test_one_process_alone_keeps_what_it_has() -> None:
    x = torch.arange(4.0)
    average(x)
    assert gathered(x) is x and x.tolist() == [0, 1, 2, 3]
    assert (num_processes(), process_index()) == (1, 0)


def test_a_meter_weighs_steps_of_much_foreground_more_and_reads_anew_each_time() -> None:
    meter, visible = Meter(), torch.tensor([[True, False, False, False]])
    foregrounds = [torch.tensor([[1.0, 1, 0, 0]]), torch.tensor([[0.0, 0, 0, 0.2]])]
    for foreground in foregrounds:
        meter.add({"lift": ((foreground * visible).sum() / visible.sum(), foreground.mean())})
    lifts = motion_lift(visible.expand(2, 4), torch.cat(foregrounds))
    assert meter.means()["lift"] == pytest.approx(float(lifts)) and meter.means() == {}
