"""What the scheduler in a pipeline's folder says of the training is kept to."""

import diffusers
import pytest

from asesearch.backbones.checkpoints import load_backbone
from asesearch.backbones.diffusers_adapter import load_diffusers
from asesearch.backbones.scheduler import check_betas
from asesearch.config import BackboneConfig, DiffusionConfig, parse_study
from asesearch.errors import CheckpointError, ConfigError
from asesearch.finetuning.from_file import StudyTraining
from tests.backbones.test_diffusers_adapter import case

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture
def pipeline(tmp_path):
    """Writes a pipeline's folder of a network and a scheduler."""

    def write(name="dit", cls="DDIMScheduler", **options):
        case(name)[0].save_pretrained(tmp_path / "transformer")
        getattr(diffusers, cls)(**options).save_pretrained(tmp_path / "scheduler")
        return tmp_path

    return write


def backbone(path, kind="dit"):
    return BackboneConfig(kind=kind, checkpoint=str(path))


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("DDIMScheduler", {"prediction_type": "v_prediction"}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "sample"}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
        ("FlowMatchEulerDiscreteScheduler", {}),
    ],
)
def test_what_does_not_predict_noise_is_refused(pipeline, cls, options):
    path = pipeline(cls=cls, **options)
    wanted = options.get("prediction_type", "flow_prediction")
    for load in (
        lambda: load_diffusers(path),
        lambda: load_diffusers(path / "transformer"),
        lambda: load_backbone(backbone(path)),
        lambda: load_backbone(backbone(path, "diffusers")),
    ):
        with pytest.raises(CheckpointError, match=f"the network predicts '{wanted}'; .* noise"):
            load()


def test_schedulers_of_networks_that_predict_noise_or_are_for_pipelines_alone_pass(pipeline):
    for cls in ("DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        path = pipeline("pixart", cls)
        load_diffusers(path)
        check_betas(backbone(path, "diffusers"), DiffusionConfig())
    path = pipeline("dit", "DDPMScheduler", variance_type="learned_range")
    load_backbone(backbone(path, "diffusers"))
    for name in ("sana", "sd3"):  # their solvers refuse them
        path = pipeline(name, "FlowMatchEulerDiscreteScheduler")
        load_diffusers(path)
        check_betas(backbone(path, "diffusers"), DiffusionConfig())


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        (SCALED, 'set beta_schedule = "scaled_linear" and num_train_timesteps = 1000'),
        (
            {"num_train_timesteps": 500, "beta_start": 2e-4, "beta_end": 0.04},
            'set beta_schedule = "linear" and num_train_timesteps = 500',
        ),
        ({"num_train_timesteps": 500}, "asesearch has no such betas"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "asesearch has no such betas"),
        ({"rescale_betas_zero_snr": True}, "asesearch has no such betas"),
        ({"trained_betas": [0.1] * 10}, "asesearch has no such betas"),
    ],
)
def test_other_betas_than_the_studys_are_refused(pipeline, options, fix):
    path = pipeline(**options)
    for place in (path, path / "transformer"):
        with pytest.raises(ConfigError, match=r"\[diffusion\] must be as the network was trained"):
            check_betas(backbone(place), DiffusionConfig())
    with pytest.raises(ConfigError, match=fix):
        check_betas(backbone(path), DiffusionConfig())


def test_betas_that_are_the_studys_pass(pipeline, tmp_path):
    check_betas(backbone(pipeline(**SCALED)), DiffusionConfig(beta_schedule="scaled_linear"))
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json is not readable JSON"):
        check_betas(backbone(tmp_path), DiffusionConfig())
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    check_betas(backbone(tmp_path), DiffusionConfig(beta_schedule="scaled_linear"))
    check_betas(backbone("shipped:fashion-mnist-dit"), DiffusionConfig(num_train_timesteps=500))


def test_a_study_file_is_compared_before_the_network_is_read(pipeline, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    path = pipeline(**SCALED)
    (path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    text = {
        "name": "other",
        "backbone": {"kind": "dit", "checkpoint": str(path)},
        "data": {"kind": "fashion-mnist", "split": "test"},
        "train": {"num_steps": 2, "batch_size": 4},
    }
    with pytest.raises(ConfigError, match='set beta_schedule = "scaled_linear"'):
        StudyTraining(parse_study(text, "t"), "full", out / "out.safetensors", out / "r")
