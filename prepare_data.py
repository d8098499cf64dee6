"""List the audio files of a data set: LibriSpeech, or any folder of audio.

    python prepare_data.py --data /path/to/LibriSpeech --out data
    python prepare_data.py --data /path/to/audio --out data/mine --convert data/mine/audio

LibriSpeech gives train100.tsv, train960.tsv (when its three training parts are there) and valid.tsv (dev-clean and
dev-other; without them, speakers of train-clean-100 that are in no other list). Any other folder gives train.tsv and
valid.tsv. Models take 16 kHz mono: --convert makes copies of what is something else, of any format that libsndfile
reads, or ffmpeg where it is installed. Originals are never changed.
"""

from distillation.commandline import make_parser, parse_arguments
from distillation.data.preparation import Preparation, prepare
from distillation.errors import command


@command
def main() -> None:
    """Parse the command line and run."""
    parser = make_parser(__doc__)
    parser.add_class_arguments(Preparation, as_group=False, skip={"check", "skip_broken"})
    # By hand: from the fields they would not be switches but want the word "true".
    text = "decode every file; those that are broken, silent or clipped are an error and listed in OUT/broken.tsv"
    parser.add_argument("--check", action="store_true", help=text)
    text = "leave out the files that cannot be read, and write the lists of the rest"
    parser.add_argument("--skip_broken", action="store_true", help=text)
    prepare(Preparation(**vars(parse_arguments(parser))))


if __name__ == "__main__":
    main()
