// Loads a package that `qp.lower(model, args, path="model.pt2")` wrote, and runs it: no Python.
#include <torch/torch.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>
#include <vector>

static std::vector<char> read(const char* path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

int main(int count, char** paths) {
    if (count != 4) {
        std::cerr << "usage: " << paths[0] << " model.pt2 input.pt output.pt\n";
        return 2;
    }
    c10::InferenceMode inference;
    torch::inductor::AOTIModelPackageLoader model(paths[1]);
    std::vector<torch::Tensor> inputs{torch::pickle_load(read(paths[2])).toTensor()};
    std::vector<torch::Tensor> outputs = model.run(inputs);
    std::vector<char> written = torch::pickle_save(outputs.at(0));
    std::ofstream(paths[3], std::ios::binary).write(written.data(), written.size());
}
