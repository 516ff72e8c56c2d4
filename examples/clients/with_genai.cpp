// Asks a converted model by ONNX Runtime GenAI's own library, without a server and without Python:
//
//   g++ -std=c++17 -O2 with_genai.cpp -L "$LIBRARY" -l:libonnxruntime-genai.so -Wl,-rpath,"$LIBRARY" -o ask
//   ./ask outputs/demo/bundle/model "where is my parcel?"
//
// LIBRARY is a folder with libonnxruntime-genai.so and the libonnxruntime.so that it loads: those of a release of ONNX Runtime
// GenAI, or of the Python packages (see README.md). The functions that are used are declared here as in ort_genai_c.h, so that
// the example needs no header; a real program includes that file.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>

extern "C" {
struct OgaResult;
struct OgaModel;
struct OgaTokenizer;
struct OgaTokenizerStream;
struct OgaSequences;
struct OgaGeneratorParams;
struct OgaGenerator;
const char* OgaResultGetError(const OgaResult*);
void OgaDestroyResult(OgaResult*);
void OgaDestroyString(const char*);
void OgaShutdown();
OgaResult* OgaCreateModel(const char* folder, OgaModel**);
void OgaDestroyModel(OgaModel*);
OgaResult* OgaCreateTokenizer(const OgaModel*, OgaTokenizer**);
void OgaDestroyTokenizer(OgaTokenizer*);
OgaResult* OgaTokenizerApplyChatTemplate(const OgaTokenizer*, const char* other, const char* messages, const char* tools, bool answer,
                                         const char** text);
OgaResult* OgaCreateSequences(OgaSequences**);
void OgaDestroySequences(OgaSequences*);
OgaResult* OgaTokenizerEncode(const OgaTokenizer*, const char* text, OgaSequences*);
OgaResult* OgaCreateTokenizerStream(const OgaTokenizer*, OgaTokenizerStream**);
void OgaDestroyTokenizerStream(OgaTokenizerStream*);
OgaResult* OgaTokenizerStreamDecode(OgaTokenizerStream*, int32_t token, const char** piece);
OgaResult* OgaCreateGeneratorParams(const OgaModel*, OgaGeneratorParams**);
void OgaDestroyGeneratorParams(OgaGeneratorParams*);
OgaResult* OgaCreateGenerator(const OgaModel*, const OgaGeneratorParams*, OgaGenerator**);
void OgaDestroyGenerator(OgaGenerator*);
OgaResult* OgaGenerator_AppendTokenSequences(OgaGenerator*, const OgaSequences*);
bool OgaGenerator_IsDone(OgaGenerator*);
OgaResult* OgaGenerator_GenerateNextToken(OgaGenerator*);
OgaResult* OgaGenerator_GetNextTokens(const OgaGenerator*, const int32_t** tokens, size_t* count);
}

namespace {

void check(OgaResult* result) {
  if (result == nullptr) return;
  const std::string said = OgaResultGetError(result);
  OgaDestroyResult(result);
  throw std::runtime_error(said);
}

template <typename Thing>
using Owned = std::unique_ptr<Thing, void (*)(Thing*)>;

/// What `create` makes, destroyed by `destroy` when it is no longer needed.
template <typename Thing, typename Create>
Owned<Thing> make(void (*destroy)(Thing*), Create create) {
  Thing* made = nullptr;
  check(create(&made));
  return {made, destroy};
}

std::string json(const std::string& text) {
  std::string out = "\"";
  for (const unsigned char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c < 0x20) {
      char escape[7];
      std::snprintf(escape, sizeof escape, "\\u%04x", c);
      out += escape;
    } else {
      out += static_cast<char>(c);
    }
  }
  return out + '"';
}

void ask(const char* folder, const std::string& message) {
  const auto model = make<OgaModel>(OgaDestroyModel, [&](auto out) { return OgaCreateModel(folder, out); });
  const auto tokenizer = make<OgaTokenizer>(OgaDestroyTokenizer, [&](auto out) { return OgaCreateTokenizer(model.get(), out); });
  const auto stream =
      make<OgaTokenizerStream>(OgaDestroyTokenizerStream, [&](auto out) { return OgaCreateTokenizerStream(tokenizer.get(), out); });
  const auto sequences = make<OgaSequences>(OgaDestroySequences, OgaCreateSequences);
  const std::string messages = "[{\"role\": \"user\", \"content\": " + json(message) + "}]";
  const char* prompt = nullptr;
  check(OgaTokenizerApplyChatTemplate(tokenizer.get(), nullptr, messages.c_str(), nullptr, true, &prompt));
  const std::unique_ptr<const char, void (*)(const char*)> owner(prompt, OgaDestroyString);
  check(OgaTokenizerEncode(tokenizer.get(), prompt, sequences.get()));
  const auto params = make<OgaGeneratorParams>(OgaDestroyGeneratorParams, [&](auto out) { return OgaCreateGeneratorParams(model.get(), out); });
  const auto generator =
      make<OgaGenerator>(OgaDestroyGenerator, [&](auto out) { return OgaCreateGenerator(model.get(), params.get(), out); });
  check(OgaGenerator_AppendTokenSequences(generator.get(), sequences.get()));
  while (!OgaGenerator_IsDone(generator.get())) {
    check(OgaGenerator_GenerateNextToken(generator.get()));
    const int32_t* tokens = nullptr;
    size_t count = 0;
    check(OgaGenerator_GetNextTokens(generator.get(), &tokens, &count));
    const char* piece = nullptr;
    if (count != 0) check(OgaTokenizerStreamDecode(stream.get(), tokens[0], &piece));
    if (piece != nullptr) std::fputs(piece, stdout);
    std::fflush(stdout);
  }
  std::puts("");
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: %s MODEL-FOLDER MESSAGE\n", arguments[0]);
    return 2;
  }
  int code = 0;
  try {
    ask(arguments[1], arguments[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    code = 1;
  }
  OgaShutdown();
  return code;
}
