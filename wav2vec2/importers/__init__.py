"""Read models of other toolkits into this one: pure functions on plain config and state dicts; torch alone needed."""

from .converting import recognise, save_imported
from .distiller import import_distiller
from .fairseq import import_fairseq
from .huggingface import import_huggingface
from .mapping import ImportedModel, naming
from .pickles import load_pickled
from .source import Source, check_replaced, converted_file
from .students import import_student
from .torchaudio import import_torchaudio
from .vocabulary import Vocabulary, keep_head

__all__ = [
    "ImportedModel",
    "Source",
    "Vocabulary",
    "check_replaced",
    "converted_file",
    "import_distiller",
    "import_fairseq",
    "import_huggingface",
    "import_student",
    "import_torchaudio",
    "keep_head",
    "load_pickled",
    "naming",
    "recognise",
    "save_imported",
]
