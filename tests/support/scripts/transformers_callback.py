"""Hugging Face's `MLflowCallback`, called as its Trainer does (which wants torch): params by hundreds, logs, a nested run."""

# mypy: ignore-errors
import os
from types import SimpleNamespace

import mlflow
from transformers.integrations.integration_utils import MLflowCallback
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, TrainerControl, TrainerState


class Arguments(SimpleNamespace):
    def to_dict(self):
        return vars(self)


def train(name, nested):
    os.environ["MLFLOW_NESTED_RUN"] = str(nested)
    os.environ["MLFLOW_FLATTEN_PARAMS"] = "TRUE"
    os.environ["MLFLOW_TAGS"] = '{"release": "2.2.0"}'
    many = {f"option {at}": at / 7 for at in range(250)}
    config = SimpleNamespace(to_dict=lambda: {"hidden": 768, "labels": {"0": "no", "1": "yes"}})
    args = Arguments(
        run_name=name, optim="adamw", logging_strategy="steps", logging_first_step=False,
        logging_steps=10, eval_strategy="no", eval_steps=10, save_strategy="no", save_steps=10, **many,
    )  # fmt: skip
    callback = MLflowCallback()
    handler = CallbackHandler(
        [DefaultFlowCallback(), callback], SimpleNamespace(config=config), processing_class=None, optimizer=None,
        lr_scheduler=None,
    )  # fmt: skip
    state = TrainerState(is_world_process_zero=True, logging_steps=10, eval_steps=10, save_steps=10)
    control = TrainerControl()
    handler.on_train_begin(args, state, control)
    for step in range(1, 121):
        state.global_step = step
        logs = {"loss": 1 / step, "grad_norm": float(step), "learning_rate": 1e-3 / step, "epoch": step / 40}
        handler.on_log(args, state, control, logs | ({"eval/acc (top-1)": step / 120} if step % 10 == 0 else {}))
    handler.on_train_end(args, state, control)


train("fine-tuning", nested=False)
with mlflow.start_run(run_name="search"):
    for number in range(2):
        train(f"trial {number}", nested=True)
    print("best", mlflow.search_runs(filter_string="attributes.run_name LIKE 'trial%'")["metrics.loss"].min())
