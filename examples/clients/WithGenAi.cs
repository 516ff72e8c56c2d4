// Asks a converted model by ONNX Runtime GenAI, without a server:
//
//   dotnet new console -o ask && cp WithGenAi.cs ask/Program.cs && cd ask
//   dotnet add package Microsoft.ML.OnnxRuntimeGenAI
//   dotnet run -- ../outputs/demo/bundle/model "where is my parcel?"
//
// The tests only check its syntax: it has not been run.

using System;
using System.Text.Json;
using Microsoft.ML.OnnxRuntimeGenAI;

if (args.Length != 2)
{
    Console.Error.WriteLine("usage: ask MODEL-FOLDER MESSAGE");
    return 2;
}

using var model = new Model(args[0]);
using var tokenizer = new Tokenizer(model);
using var stream = tokenizer.CreateStream();
using var settings = new GeneratorParams(model);

var messages = JsonSerializer.Serialize(new[] { new { role = "user", content = args[1] } });
var prompt = tokenizer.ApplyChatTemplate(null, messages, null, true);
using var tokens = tokenizer.Encode(prompt);
using var generator = new Generator(model, settings);
generator.AppendTokenSequences(tokens);
while (!generator.IsDone())
{
    generator.GenerateNextToken();
    var next = generator.GetNextTokens();
    if (next.Length > 0) // with the end token there is none
    {
        Console.Write(stream.Decode(next[0]));
    }
}
Console.WriteLine();
return 0;
