// Generates greedily from an artifact of `lethe export --format aoti` made on a CPU: libtorch is all it takes.
//
//   generate ARTIFACT --ids 1,2,3 [--ids 4,5] [--max-new-tokens N]
//
// prints a line of ids for each prompt, prompt and new tokens, as `lethe run` does where there is no tokenizer. The
// loop is that of lethe_compile/artifact/loop.py: prefill, a round whenever the policy's interval is over, a token a
// step until all rows have ended.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <algorithm>
#include <iostream>
#include <limits>
#include <memory>

#include "json.h"

namespace {

using at::Tensor;
using torch::inductor::AOTIModelPackageLoader;
using Ids = std::vector<int64_t>;

constexpr int64_t kStep = 32;       // capacities are multiples of it
constexpr int64_t kPrefill = 1024;  // most tokens of a prompt that are handed over at once

at::ScalarType dtype_of(const std::string& name) {
  static const std::map<std::string, at::ScalarType> known = {
      {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}, {"int64", at::kLong},
      {"int32", at::kInt},     {"bool", at::kBool}};
  return known.at(name);
}

class Artifact {
 public:
  explicit Artifact(const std::string& folder) : manifest_(JsonReader::read(folder + "/manifest.json")) {
    if (manifest_["format"].number > 1) throw std::runtime_error(folder + " has a newer format than this program reads");
    const Json& programs = manifest_["programs"];
    if (manifest_["kind"].text != "aoti" || programs.has("decode"))
      throw std::runtime_error(folder + " is no artifact of AOTInductor made on a CPU");
    for (const auto& [name, program] : programs.members) {
      loaders_[name] = std::make_unique<AOTIModelPackageLoader>(folder + "/" + program["file"].text);
      inputs_[name] = program["inputs"].strings();
      outputs_[name] = program["outputs"].strings();
    }
  }

  int64_t interval() const { return static_cast<int64_t>(manifest_["policy"]["interval"].number); }
  double decay() const {
    const Json& decay = manifest_["policy"]["decay"];
    return decay.kind == Json::Null ? 1.0 : decay.number;
  }
  int64_t vocab_size() const { return static_cast<int64_t>(manifest_["model"]["vocab_size"].number); }
  Ids end_tokens() const {
    Ids ends;
    for (const Json& one : manifest_["generation"]["eos_token_id"].items) ends.push_back(static_cast<int64_t>(one.number));
    return ends;
  }
  bool has_rounds() const { return loaders_.count("prune") > 0; }

  // Empty caches for so many rows.
  void begin(int64_t rows) {
    const auto& caches = manifest_["caches"].items;
    const int64_t count = static_cast<int64_t>(caches.size());
    const at::ScalarType dtype = dtype_of(manifest_["model"]["dtype"].text);
    capacity_ = 0;
    tensors_.clear();
    cached_ = {"position", "mass"};
    tensors_["position"] = at::zeros({count, rows, 0}, at::kInt);
    tensors_["mass"] = at::zeros({count, rows, 0}, at::kFloat);
    tensors_["length"] = at::zeros({count, rows}, at::kInt);
    for (int64_t index = 0; index < count; ++index) {
      const Json& cache = caches[index];
      const int64_t heads = static_cast<int64_t>(cache["kv_heads"].number);
      for (const std::string kind : {"k", "v"}) {
        const int64_t dim = static_cast<int64_t>(cache[kind + "_dim"].number);
        const std::string name = kind + "_" + std::to_string(index);
        tensors_[name] = at::zeros({rows, heads, 0, dim}, dtype);
        cached_.push_back(name);
      }
    }
    for (const Json& one : manifest_["state"].items) {
      const Json& initial = one["initial"];
      const double value = initial.kind == Json::Null ? std::numeric_limits<double>::quiet_NaN() : initial.number;
      tensors_[one["name"].text] = at::full({count, rows}, value, at::dtype(dtype_of(one["dtype"].text)));
    }
  }

  // Room for so many more tokens in every row; what is not needed is given back.
  void reserve(int64_t tokens) {
    const int64_t needed = tensors_["length"].max().item<int64_t>() + tokens;
    const int64_t capacity = (needed + kStep - 1) / kStep * kStep;
    if (capacity == capacity_) return;
    const int64_t kept = std::min(capacity, capacity_);
    for (const std::string& name : cached_) {
      const Tensor old = tensors_[name];
      std::vector<int64_t> shape = old.sizes().vec();
      shape[2] = capacity;
      Tensor resized = at::zeros(shape, old.options());
      resized.narrow(2, 0, kept).copy_(old.narrow(2, 0, kept));
      tensors_[name] = resized;
    }
    capacity_ = capacity;
  }

  // Runs a program; tensors that it returns as `NAME_after` are the next call's `NAME`.
  void run(const std::string& name, const std::map<std::string, Tensor>& given) {
    std::vector<Tensor> inputs;
    for (const std::string& input : inputs_[name])
      inputs.push_back(given.count(input) ? given.at(input) : tensors_.at(input));
    const std::vector<Tensor> results = loaders_[name]->run(inputs);
    for (size_t index = 0; index < results.size(); ++index) {
      std::string output = outputs_[name][index];
      const size_t suffix = output.rfind("_after");
      if (suffix != std::string::npos) output.resize(suffix);
      tensors_[output] = results[index];
    }
  }

  const Tensor& logits() const { return tensors_.at("logits"); }

 private:
  Json manifest_;
  std::map<std::string, std::unique_ptr<AOTIModelPackageLoader>> loaders_;
  std::map<std::string, std::vector<std::string>> inputs_, outputs_;
  std::map<std::string, Tensor> tensors_;  // caches and the policy's state
  std::vector<std::string> cached_;        // those that have a slot for each token
  int64_t capacity_ = 0;
};

class Loop {
 public:
  Loop(Artifact& artifact, const std::vector<Ids>& prompts)
      : artifact_(artifact), result_(prompts), rows_(static_cast<int64_t>(prompts.size())) {
    longest_ = 0;
    std::vector<int64_t> lengths;
    for (const Ids& prompt : prompts) {
      lengths.push_back(static_cast<int64_t>(prompt.size()));
      longest_ = std::max(longest_, lengths.back());
    }
    prompt_length_ = at::tensor(lengths, at::kLong);
    next_position_ = prompt_length_.clone();
    active_ = at::ones({rows_}, at::kBool);
  }

  std::vector<Ids> generate(int64_t new_tokens) {
    Tensor logits = prefill();
    for (int64_t step = 1;; ++step) {
      choose(logits);
      if (step == new_tokens || !active_.any().item<bool>()) return result_;
      logits = decode(new_tokens - step);
    }
  }

 private:
  Tensor prefill() {
    artifact_.begin(rows_);
    artifact_.reserve(longest_);
    Tensor ids = at::zeros({rows_, longest_}, at::kLong);
    for (int64_t row = 0; row < rows_; ++row) {
      const Ids& prompt = result_[row];
      ids[row].narrow(0, 0, static_cast<int64_t>(prompt.size())).copy_(at::tensor(prompt, at::kLong));
    }
    Tensor logits;
    for (int64_t start = 0; start < longest_; start += kPrefill) {
      const int64_t count = std::min(kPrefill, longest_ - start);
      const Tensor lengths = (prompt_length_ - start).clamp(0, count);
      const Tensor positions = at::arange(start, start + count, at::kLong).repeat({rows_, 1});
      // The parts of a prompt are one step: scores fade once.
      step(ids.narrow(1, start, count).contiguous(), positions, lengths, start == 0 ? artifact_.decay() : 1.0);
      const Tensor after = artifact_.logits();
      logits = logits.defined() ? at::where(lengths.gt(0).unsqueeze(1), after, logits) : after;
    }
    round();
    return logits;
  }

  Tensor decode(int64_t left) {
    if (until_round_ == 0) round();
    if (until_round_ == artifact_.interval()) artifact_.reserve(std::min(left, artifact_.interval()));
    --until_round_;
    const Tensor ids = at::where(active_, tokens_, at::zeros_like(tokens_)).unsqueeze(1);
    step(ids, next_position_.unsqueeze(1), active_, artifact_.decay());
    next_position_ = next_position_ + active_;
    return artifact_.logits();
  }

  void step(const Tensor& ids, const Tensor& positions, const Tensor& lengths, double decay) {
    artifact_.run(
        "step",
        {{"input_ids", ids},
         {"positions", positions.contiguous()},
         {"new_lengths", lengths.to(at::kInt)},
         {"decay", at::full({1}, decay, at::kFloat)}});
  }

  void round() {
    until_round_ = artifact_.interval();
    if (!artifact_.has_rounds()) return;
    artifact_.run(
        "prune", {{"active", active_}, {"prompt_length", prompt_length_}, {"next_position", next_position_.contiguous()}});
  }

  void choose(const Tensor& logits) {
    tokens_ = logits.argmax(1);
    for (int64_t row = 0; row < rows_; ++row) {
      if (!active_[row].item<bool>()) continue;
      const int64_t token = tokens_[row].item<int64_t>();
      result_[row].push_back(token);
      const Ids ends = artifact_.end_tokens();
      if (std::find(ends.begin(), ends.end(), token) != ends.end()) active_[row] = false;
    }
  }

  Artifact& artifact_;
  std::vector<Ids> result_;
  int64_t rows_, longest_, until_round_ = 0;
  Tensor prompt_length_, next_position_, active_, tokens_;
};

Ids parse_ids(const std::string& text, int64_t vocab_size) {
  Ids ids;
  std::stringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    size_t end = 0;
    const int64_t id = std::stoll(part, &end);
    if (end != part.size() || id < 0 || id >= vocab_size)
      throw std::runtime_error("--ids " + text + ": " + part + " is not an id of this model");
    ids.push_back(id);
  }
  if (ids.empty()) throw std::runtime_error("--ids names no id");
  return ids;
}

int run(int argc, char** argv) {
  if (argc < 2) throw std::runtime_error("usage: generate ARTIFACT --ids 1,2,3 [--ids 4,5] [--max-new-tokens N]");
  Artifact artifact(argv[1]);
  std::vector<Ids> prompts;
  int64_t new_tokens = 20;
  for (int index = 2; index + 1 < argc; index += 2) {
    const std::string flag = argv[index], value = argv[index + 1];
    if (flag == "--ids") prompts.push_back(parse_ids(value, artifact.vocab_size()));
    else if (flag == "--max-new-tokens") new_tokens = std::stoll(value);
    else throw std::runtime_error("no option " + flag);
  }
  if (prompts.empty() || new_tokens < 1) throw std::runtime_error("give --ids 1,2,3, and at least one new token");
  c10::InferenceMode guard;
  for (const Ids& row : Loop(artifact, prompts).generate(new_tokens))
    for (size_t at = 0; at < row.size(); ++at) std::cout << row[at] << (at + 1 < row.size() ? "," : "\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "generate: error: " << error.what() << "\n";
    return 2;
  }
}
