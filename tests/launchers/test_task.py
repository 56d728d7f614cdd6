"""What a rank makes of SLURM's variables and of its arguments."""

import pytest

from d2s.launchers.task import rank_variables, resumed, tasks_per_node, with_seed

TASK = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_TASKS_PER_NODE": "2(x3),1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "20007",
}


def test_ranks_are_named_as_torch_names_them() -> None:
    assert rank_variables(TASK) == {
        "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "2",
    }  # fmt: skip


def test_local_tasks_meet_at_a_port_of_their_job() -> None:
    local = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2",
             "SUBMITIT_LOCAL_LOCALID": "1", "SUBMITIT_LOCAL_JOB_ID": "41234"}  # fmt: skip
    found = rank_variables({**TASK, **local})
    assert (found["RANK"], found["WORLD_SIZE"]) == ("1", "2")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("127.0.0.1", "21234")


@pytest.mark.parametrize("name", ["SLURM_PROCID", "MASTER_ADDR"])
def test_a_process_that_srun_did_not_start_is_told_so(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not set: start this with srun"):
        rank_variables({key: value for key, value in TASK.items() if key != name})


def test_short_form_of_tasks_per_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("8") == [8]


def test_a_later_start_resumes_a_training_and_nothing_else() -> None:
    again = {"SLURM_RESTART_COUNT": "1"}
    assert resumed(["train", "r"], {}) == ["train", "r"]
    assert resumed(["train", "r"], again) == ["train", "r", "--resume"]
    assert resumed(["train", "r", "--resume"], again) == ["train", "r", "--resume"]
    assert resumed(["evaluate"], again) == ["evaluate"]


def test_seed_of_an_array() -> None:
    array = {"SLURM_ARRAY_TASK_ID": "3"}
    given = ["train", "r", "--run", "runs/x-{seed}", "--seed", "{seed}"]
    assert with_seed(given, array) == ["train", "r", "--run", "runs/x-3", "--seed", "3"]
    with pytest.raises(ValueError, match="would write into one run"):
        with_seed(["train", "r", "--run", "runs/x"], array)
    assert with_seed(["train", "r", "--run", "x"], {**array, "SUBMITIT_EXECUTOR": "slurm"})[-1] == "x"
    with pytest.raises(ValueError, match="use sbatch --array"):
        with_seed(given, {})
