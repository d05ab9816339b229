"""Registration with transformers' Auto classes: one line a model family in each function.

The functions are called by post-import hooks (``hf_lipschitz/__init__.py``) the moment transformers' auto modules
exist.
"""

from __future__ import annotations

import sys


def register_configs() -> None:
    """Make ``AutoConfig`` know our model types."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from hf_lipschitz.models.lip_vit.configuration_lip_vit import LipViTConfig

    AutoConfig.register("lip_vit", LipViTConfig, exist_ok=True)


def register_models() -> None:
    """Make ``AutoModel`` and ``AutoModelFor...`` know our models.

    transformers imports its auto modules from the modules that our own modeling files start with; where one of those
    is being
    imported right now, this does nothing: it is called again when that module is complete.
    """
    modeling = "hf_lipschitz.models.lip_vit.modeling_lip_vit"
    if modeling in sys.modules and not hasattr(sys.modules[modeling], "LipViTForImageClassification"):
        return
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForImageClassification

    from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTConfig, LipViTForImageClassification, LipViTModel

    AutoModel.register(LipViTConfig, LipViTModel, exist_ok=True)
    AutoModelForImageClassification.register(LipViTConfig, LipViTForImageClassification, exist_ok=True)


def register_image_processors() -> None:
    """Make ``AutoImageProcessor`` know our processors; without torchvision only the PIL one can be imported."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.utils.import_utils import is_torchvision_available

    from hf_lipschitz.models.lip_vit.configuration_lip_vit import LipViTConfig
    from hf_lipschitz.models.lip_vit.image_processing_pil_lip_vit import LipViTImageProcessorPil

    classes: dict[str, type] = {"pil": LipViTImageProcessorPil}
    if is_torchvision_available():
        from hf_lipschitz.models.lip_vit.image_processing_lip_vit import LipViTImageProcessor

        classes["torchvision"] = LipViTImageProcessor
    AutoImageProcessor.register(LipViTConfig, image_processor_classes=classes, exist_ok=True)
