"""`tcurlora predict`: label maps of new scans by adapted networks."""

from .predicting import PredictOptions, predict_image, predict_scans
from .predictor import Predictor, load_files, load_predictor

__all__ = ["PredictOptions", "Predictor", "load_files", "load_predictor", "predict_image", "predict_scans"]
