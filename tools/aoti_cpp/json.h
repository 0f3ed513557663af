// As much of JSON as a manifest holds.

#pragma once

#include <cctype>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Json {
  enum Kind { Null, Bool, Number, String, Array, Object } kind = Null;
  double number = 0;  // of a number or a truth value
  std::string text;
  std::vector<Json> items;
  std::map<std::string, Json> members;

  const Json& operator[](const std::string& name) const {
    auto found = members.find(name);
    if (found == members.end()) throw std::runtime_error("the manifest has no \"" + name + "\"");
    return found->second;
  }
  bool has(const std::string& name) const { return members.count(name) > 0; }
  std::vector<std::string> strings() const {
    std::vector<std::string> result;
    for (const Json& item : items) result.push_back(item.text);
    return result;
  }
};

class JsonReader {
 public:
  static Json read(const std::string& path) {
    std::ifstream file(path);
    if (!file) throw std::runtime_error(path + " is not there: `lethe export` writes it");
    std::stringstream buffer;
    buffer << file.rdbuf();
    JsonReader reader(buffer.str());
    Json value = reader.value();
    reader.expect(reader.at_ == reader.text_.size());
    return value;
  }

 private:
  explicit JsonReader(std::string text) : text_(std::move(text)) {}

  Json value() {
    Json result;
    const char next = peek();
    if (next == '{') {
      result.kind = Json::Object;
      list('}', [&] {
        std::string name = string();
        expect(peek() == ':');
        ++at_;
        result.members[name] = value();
      });
    } else if (next == '[') {
      result.kind = Json::Array;
      list(']', [&] { result.items.push_back(value()); });
    } else if (next == '"') {
      result.kind = Json::String;
      result.text = string();
    } else {
      const size_t start = at_;
      while (at_ < text_.size() && (std::isalnum(text_[at_]) || std::string("+-.").find(text_[at_]) != std::string::npos))
        ++at_;
      const std::string word = text_.substr(start, at_ - start);
      expect(!word.empty());
      if (word == "true" || word == "false") {
        result.kind = Json::Bool;
        result.number = word == "true";
      } else if (word != "null") {
        result.kind = Json::Number;
        result.number = std::stod(word);
      }
    }
    skip();
    return result;
  }

  template <typename Item>
  void list(char end, Item item) {
    ++at_;
    while (peek() != end) {
      item();
      if (peek() == ',') ++at_;
    }
    ++at_;
  }

  std::string string() {
    expect(peek() == '"');
    std::string result;
    for (++at_; at_ < text_.size() && text_[at_] != '"'; ++at_) {
      if (text_[at_] == '\\') {  // names of files and tensors have no other escapes
        ++at_;
        expect(at_ < text_.size());
      }
      result += text_[at_];
    }
    expect(at_ < text_.size());
    ++at_;
    skip();
    return result;
  }

  char peek() {
    skip();
    expect(at_ < text_.size());
    return text_[at_];
  }
  void skip() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
  }
  void expect(bool condition) const {
    if (!condition) throw std::runtime_error("the manifest is no JSON at character " + std::to_string(at_));
  }

  std::string text_;
  size_t at_ = 0;
};
