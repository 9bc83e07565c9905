"""The kinds of error a user is meant to mend, each with the code that stands before its message and on its page."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of error.

    Args:
        code: what it is called, as is printed before every message of the kind.
        symptom: what is seen.
        cause: what is behind it, most often.
        mend: what to do about it.
    """

    code: str
    symptom: str
    cause: str
    mend: str


KINDS = {
    kind.code: kind
    for kind in (
        # --------------------------------------------------------------------------------------------- the model
        Kind(
            "model-not-found",
            "No model is where one was looked for.",
            "A misspelt path or hub id, a revision that does not exist, no network, or a gated model without a login.",
            "Check the path or id and the revision; log in with `hf auth login` for gated models.",
        ),
        Kind(
            "model-kind",
            "The model is of a kind that this analysis does not take.",
            "It makes no text, takes images where none are given, has layers of another build, or is not the one of the "
            "pair or triple that was asked for.",
            "Give a model of the kind that the message names, or ask it another question: the verbs differ in what they "
            "rest on.",
        ),
        Kind(
            "model-not-whole",
            "Weights or files that the model needs are missing.",
            "A download or copy that broke off, weights saved under other names, a configuration of other sizes, or "
            "weights left on the device `meta`. What is missing would be random numbers.",
            "Get or save the model again, whole.",
        ),
        Kind(
            "model-broken",
            "The model's files are there, but no model comes out of them.",
            "A damaged or cut file, a configuration that describes no model, weights only as pickles (never opened: they "
            "can run code), or an architecture that this transformers does not know.",
            "Get the model again, convert pickles to safetensors where you trust them, or install a newer transformers.",
        ),
        Kind(
            "quantised",
            "The model is quantised in a way that this cannot work with.",
            "Its tensors are no weights that can be added up, its kernels do not run on this device, or they have no "
            "gradient.",
            "Use the model before its quantisation, or a weight-only quantisation that runs there.",
        ),
        Kind(
            "adapter",
            "An adapter cannot be put on its model.",
            "It is not whole, does not say which model it belongs to, or is of a kind whose numbers would not be peft's.",
            "Name its base model in adapter_config.json, or merge it into the model with peft first.",
        ),
        Kind(
            "gguf",
            "A GGUF file cannot be read or converted.",
            "It is damaged, or of an architecture or a type of tensor that the toolkit does not convert exactly.",
            "Get the file again, or give the model as a directory of safetensors.",
        ),
        Kind(
            "tokenizer",
            "The tokenizer is missing, is not the model's, or cannot do what is needed.",
            "Files that were not copied, a slow tokenizer without character offsets, no token that ends an answer, more "
            "tokens than the embedding has rows, or models whose vocabularies differ.",
            "Put the model's own tokenizer.json and tokenizer_config.json beside its weights; convert a slow one.",
        ),
        Kind(
            "not-itself",
            "The model that would be analysed differs from the untouched one.",
            "On the seam, in a wrapper or while loading, its numbers change by more than rounding: the family does "
            "something that the toolkit does not know, or a wrapper has processed the weights.",
            "Try --precision float32; if it stays, nothing measured on this model would hold: use another.",
        ),
        Kind(
            "not-causal",
            "Later tokens move what the model says of earlier ones.",
            "It is an encoder, or configured as one.",
            "Give a decoder; an encoder with a language-model head becomes one with `is_decoder=True`.",
        ),
        Kind(
            "off-the-seam",
            "The model's attention does not arrive at the seam once in each layer, in a form that is understood.",
            "Remote or special code that computes attention by itself, shared or recurrent layers, compressed keys, or a "
            "model in training mode. Edits would silently do nothing.",
            "Use a family that is known to work (`anchors check --families`), or write its support (see the recipe for a new family).",
        ),
        Kind(
            "certificate",
            "A number that must agree did not; the exit code is 1.",
            "Rounding in a low precision, or a family that does something in its attention that the toolkit does not "
            "know.",
            "Try --precision float32 and `anchors check`; if it stays, do not trust this analysis on this model.",
        ),
        Kind(
            "not-finite",
            "NaN or infinite numbers, or attention over no key at all, which is not defined.",
            "A damaged checkpoint, an overflow of float16, a merge that is too strong, or an edit that hides all keys.",
            "Use --precision float32 or bfloat16, a smaller strength, or weights that are whole.",
        ),
        Kind(
            "no-gradient",
            "No gradient reaches the attention, so that there is no saliency to measure.",
            "Weights that are zero or all alike, or a layer that stops the gradient.",
            "Give the weights of a trained model.",
        ),
        Kind(
            "without-effect",
            "An edit, an intervention or an injection was asked for and changed nothing.",
            "It names layers or positions that are not there, hidden by the mask or already run, or the expert equals its "
            "base there.",
            "Check its layers and positions, or declare an edit neutral; give another expert or a larger strength.",
        ),
        Kind(
            "no-shared-context",
            "The demonstrations cannot be run once and shared by many queries.",
            "The model keeps more than keys and values of each token, chooses keys by how many tokens are run, or the "
            "prompts do not begin alike.",
            "Use flow or view, which run every prompt as a whole, or another model; draw with `Draw(fresh=False)`.",
        ),
        Kind(
            "positions",
            "The model does not give tokens the positions that are needed.",
            "It takes no position_ids, leaves padding tokens out of its count, or encodes long prompts otherwise.",
            "Keep demonstrations whole, take padding tokens out of texts, or stay within the length that is named.",
        ),
        Kind(
            "length",
            "A prompt or sequence is longer than the model, or its cache, has positions for.",
            "Too many demonstrations, or long ones.",
            "Use fewer --shots or --tokens, or --skip-too-long where the verb has it.",
        ),
        Kind(
            "layers",
            "Layers are named that the model does not have, or that cannot be taken so.",
            "They are counted from 0.",
            "Give layers from 0 to the last one, such as --layers 0,5,10-12.",
        ),
        # ------------------------------------------------------------------------------------- the task and its data
        Kind(
            "prompt",
            "A prompt is not one that can be analysed.",
            "It does not follow the template, holds control tokens as text or no demonstration, lacks the right answer, or "
            "has images in other places than it says.",
            "Write each demonstration as the template does, and end with the part before the label.",
        ),
        Kind(
            "label-words",
            "The label words cannot be told apart, or not be found again in the tokens.",
            "Two are equal or begin with the same token, white space stands around them, or the tokenizer melts one with "
            "what stands beside it.",
            "Choose other label words (--labels), or put a colon before {label} and a line break after it.",
        ),
        Kind(
            "target",
            "What is to come after a prompt (--target, --against) is not one token of the model.",
            "A word of several tokens, one that melts with the end of the prompt, an id that the tokenizer does not have, or the same "
            "token twice.",
            "Give the first token of the word, with its space in quotation marks where it has one, or its id as #1234.",
        ),
        Kind(
            "chat-template",
            "Prompts cannot go through the model's chat template.",
            "The tokenizer has none, or it refuses a system's text or these turns, changes what they say, or puts something "
            "before the model's answer that it does not put before an answer that was given.",
            "Leave `--chat` or `--system` out, or take a model that was trained on conversations.",
        ),
        Kind(
            "task",
            "A task is not one: its template or its file cannot be used.",
            "The template lacks {text} or {label}, or the file is no TOML or has other keys.",
            "Give --template with {text} and {label} once each, and --labels; or the same two in a .toml file.",
        ),
        Kind(
            "data-missing",
            "There are no data where they are looked for.",
            "A misspelt path, a folder without files of both parts, or a task that has no data set of that kind.",
            "Give --data with `builtin`, `hub`, a file or a directory.",
        ),
        Kind(
            "data-file",
            "A data file cannot be read as a table of texts and labels.",
            "It is empty, of an unknown ending, not UTF-8, or its columns are others than `text` and `label`.",
            "Save it as UTF-8, as CSV, TSV, JSON, JSON lines or Parquet with the columns `text` and `label`.",
        ),
        Kind(
            "data-row",
            "A row of a data file cannot be read.",
            "Quotation marks, separators or line ends that are not quoted, a missing text, or text of another type.",
            "Mend the row that is named; quote a text as a whole, with the marks in it doubled.",
        ),
        Kind(
            "data-label",
            "A row's label is none of the task's, or could be two of them.",
            "Other label words than the file's, or numbers that are both a word and its number.",
            "Write label words or their numbers from 0, and set the words with --labels.",
        ),
        Kind(
            "too-few",
            "There are fewer examples, demonstrations or tokens than are asked for.",
            "A small data set, a class that never occurs, or texts that are too short.",
            "Ask for less (--shots, --examples, --tokens), or add examples.",
        ),
        # -------------------------------------------------------------------------------------------- the machine
        Kind(
            "device",
            "The device is not here, or cannot run this.",
            "No such accelerator, a misspelt name, or kernels that need an NVIDIA GPU.",
            "Use --device cpu, or leave it at auto.",
        ),
        Kind(
            "precision",
            "Numbers of one type stand where another is needed.",
            "A quantised model computes in a type of its own, or tensors of different types are given to one kernel.",
            "Use the --precision that the message names, or convert the tensors.",
        ),
        Kind(
            "memory",
            "The memory of the machine or the device does not suffice.",
            "A long prompt, a large batch or a large model.",
            "Use fewer --shots, a smaller batch, --precision bfloat16, another --device or --device-map auto.",
        ),
        Kind(
            "disk-full",
            "There is not enough room on the disk.",
            "A full disk or quota; converted and merged models are large.",
            "Make room, or choose another --out or ANCHORS_CACHE; what is finished is kept.",
        ),
        Kind(
            "file-unreadable",
            "A file cannot be read, or is not what it should be.",
            "It is not there, was cut short, has another format, or may not be read.",
            "Check its path and permissions; delete what a run left half done, and run again.",
        ),
        Kind(
            "file-unwritable",
            "A file or folder cannot be opened for writing.",
            "Permissions, a disk that is full or only read, or a path that leads through a file.",
            "Choose another --out, or mend its permissions; what is finished is kept.",
        ),
        Kind(
            "would-overwrite",
            "Something that is not this run's would be replaced or lost.",
            "The output stands where an input, a folder or somebody's file is.",
            "Choose another --out, or move what is there.",
        ),
        Kind(
            "outside",
            "A link or a path leads out of the folder it belongs to.",
            "Links in a model's or a result's folder, which could lead anywhere.",
            "Put a copy of the file in its place, or give the folder itself.",
        ),
        Kind(
            "busy",
            "Somebody else writes there at the same time.",
            "Another run with the same --out, or a model that is being saved while it is read.",
            "Wait for it, or choose another --out.",
        ),
        Kind(
            "workers",
            "Processes or machines that were to share the work are not there, or ended.",
            "No Ray cluster at that address, no machine with room for one cell, another environment on some machine, or work that "
            "takes more memory than there is.",
            "Look at `ray status`; install the same everywhere; give each of them less at once. What is finished is kept.",
        ),
        Kind(
            "package",
            "A package is missing, of another version, or there twice.",
            "An extra that is not installed, a transformers outside the declared range, or two checkouts of this toolkit.",
            "Install what the message names.",
        ),
        # --------------------------------------------------------------------------------------- what was asked for
        Kind(
            "unknown-name",
            "A name is none of those there are.",
            "A misspelling, most often; the nearest name is proposed.",
            "Take one of the names in the message.",
        ),
        Kind(
            "option-value",
            "The value of an option or a setting cannot be used.",
            "A number out of its range, a list that is none, or a name that is given twice.",
            "Give a value such as the one in the message.",
        ),
        Kind(
            "options-together",
            "Options contradict each other, or one needs another.",
            "Each is right by itself.",
            "Give one of them, or the one that is lacking.",
        ),
        Kind(
            "not-all-run",
            "Some experiments of several could not be run.",
            "The errors printed above, each with a code of its own.",
            "Mend those and run the same command again: what is done is kept.",
        ),
        # --------------------------------------------------------------------------------------------- rows and runs
        Kind(
            "rows",
            "A table of results lacks rows, columns or facts, or has gaps.",
            "It was made by another verb or an earlier version, or not by this toolkit.",
            "Run the verb again; in pairs, measure every condition on the same prompts.",
        ),
        Kind(
            "mixed",
            "Things that were not measured alike would be put together.",
            "Rows of several models or runs, suites of different scenarios or equal seeds, or two curves of one name.",
            "Put together one model, one run or one experiment at a time.",
        ),
        Kind(
            "other-run",
            "The folder holds results that were made with other settings.",
            "The same --out was used before with other options.",
            "Choose another --out, or give the same options to go on.",
        ),
        Kind(
            "beta",
            "A fitted β of re-weighting cannot be used here.",
            "It was fitted on another model or other classes, or its file is not whole or gone.",
            "Fit it on the model, the task and the shots it is to be applied to.",
        ),
        Kind(
            "study",
            "A study that a package brings cannot be used.",
            "Its module cannot be imported, or its settings make no options.",
            "Mend the package as the message says, or uninstall it.",
        ),
        # ----------------------------------------------------------------------------- kernels, sparse attention
        Kind(
            "shape",
            "Tensors do not fit one another, or the call that was given them.",
            "Other sizes than the signature says, a mask or a cache of another kind, or nothing to attend to.",
            "Give tensors of the shapes in the message.",
        ),
        Kind(
            "geometry",
            "The sizes of an attention do not fit one another.",
            "Blocks, strides, heads or groups that do not divide one another, or that the kernels do not hold.",
            "Choose sizes as the message says.",
        ),
        Kind(
            "diverged",
            "A training diverged: its loss is not finite.",
            "A learning rate that is too high, most often.",
            "Lower the learning rate, clip more, warm up longer, or use --precision float32.",
        ),
        # ---------------------------------------------------------------------------------------------- injection
        Kind(
            "merge-unrelated",
            "The base is not what the expert or the VLM was trained from.",
            "Another model of the same sizes was given as --base: the difference would be noise.",
            "Give the model that both were trained from, or --force to merge all the same.",
        ),
        Kind(
            "merge-layout",
            "The models do not hold the same tensors of the same shapes.",
            "Another family or size, experts stored otherwise, or a head of its own where the others share it.",
            "Give three models of one family and size; see `anchors inject --inspect`.",
        ),
        Kind(
            "merge-recipe",
            "A merging method cannot be used with these numbers.",
            "A strength, density or option out of its range, or one that the method would ignore.",
            "Leave it out, or give a value that the message allows.",
        ),
        Kind(
            "suite",
            "A suite of scenarios is not whole, or one of its files is not as it should be.",
            "A misspelt folder, a suite.json without a needed entry, or an example without its fields or image.",
            "Mend the entry that is named, or build a suite with `anchors inject demo`.",
        ),
    )
}
"""By code."""
