"""Objectives, one per file."""

from lightning_modules.antidote import AntidoteModule
from lightning_modules.base import ObjectiveModule
from lightning_modules.booster import BoosterModule
from lightning_modules.booster_vaccine import BoosterVaccineModule
from lightning_modules.dpo import DPOModule
from lightning_modules.forget_retain import ForgetRetainModule
from lightning_modules.held_booster import HeldBoosterModule
from lightning_modules.kto import KTOModule
from lightning_modules.lisa import LisaModule, SafeInstructModule
from lightning_modules.reference import ReferenceModule
from lightning_modules.repnoise import RepNoiseModule
from lightning_modules.rmu import RMUModule
from lightning_modules.sft import SFTModule
from lightning_modules.somf import SOMFModule
from lightning_modules.stored_answers import StoredAnswers
from lightning_modules.t_vaccine import TVaccineModule
from lightning_modules.tar import TARModule
from lightning_modules.unlearning import UnlearningModule
from lightning_modules.vaccine import VaccineModule

__all__ = [
    "AntidoteModule",
    "BoosterModule",
    "BoosterVaccineModule",
    "DPOModule",
    "ForgetRetainModule",
    "HeldBoosterModule",
    "KTOModule",
    "LisaModule",
    "ObjectiveModule",
    "RMUModule",
    "ReferenceModule",
    "RepNoiseModule",
    "SFTModule",
    "SOMFModule",
    "SafeInstructModule",
    "StoredAnswers",
    "TARModule",
    "TVaccineModule",
    "UnlearningModule",
    "VaccineModule",
]
