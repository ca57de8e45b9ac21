"""cluster.yaml and deploy/: fit for `ray up` and Kubernetes, and as the project promises. Running it: tests/cluster."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from tests.conftest import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
CLUSTERS = {"aws": REPOSITORY / "cluster.yaml", "gcp": DEPLOY / "cluster-gcp.yaml"}


@pytest.fixture(scope="module", params=CLUSTERS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(CLUSTERS[request.param].read_text())
    assert found["provider"]["type"] == request.param
    return found


@pytest.fixture(scope="module")
def aws() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(CLUSTERS["aws"].read_text())
    return found


def test_it_fits_the_schema_of_ray_up(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    # Nothing of what Ray fills in where a file says nothing: a pip install into the image's own Python, open doors.
    assert prepared["head_setup_commands"] == config["setup_commands"]
    assert prepared["head_start_ray_commands"] == config["head_start_ray_commands"]
    with pytest.raises(Exception, match="max_workerz"):
        validate_config(prepare_config(copy.deepcopy(config) | {"max_workerz": 3}))


def test_the_head_does_no_work_and_workers_start_from_none(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    workers = {name: kind for name, kind in types.items() if name != config["head_node_type"]}
    assert set(workers) == {"cpu_worker", "gpu_worker"}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in workers.values())
    assert sum(kind["max_workers"] for kind in workers.values()) <= config["max_workers"]


def test_the_dashboard_is_on_loopback_and_every_node_asks_for_the_token(config: dict[str, Any]) -> None:
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    starts = [line for line in commands if "ray start" in line]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "RAY_JOB_STOP_WAIT_TIME_S=60" in starts[0] and "--disable-usage-stats" in starts[0]
    assert "0.0.0.0" not in json.dumps(config)
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert "chmod 700 ~/.ray && chmod 600 ~/.ray/auth_token" in config["setup_commands"]


def test_nodes_install_the_tested_versions(config: dict[str, Any]) -> None:
    (install,) = [line for line in config["setup_commands"] if "pip install" in line]
    assert "--constraint ~/ray_qa_source/constraints.txt ~/ray_qa_source" in install and "--python 3.11" in install
    ((target, source),) = [mount for mount in config["file_mounts"].items() if mount[1] == "."]
    assert target == "~/ray_qa_source" and "**/.venv/**" in config["rsync_exclude"] and source == "."


def test_what_is_to_be_filled_in_is_marked() -> None:
    """On AWS the region and, for those who have one, the key; nothing else."""
    marked = [line for line in CLUSTERS["aws"].read_text().splitlines() if "# <-" in line or "<- your" in line]
    assert len(marked) == 3, marked
    assert all(re.search("region|key", line) for line in marked)


# --- AWS, as far as a stand-in for it goes ---------------------------------------------------------------------------


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """moto in place of AWS, within this process."""
    from moto import mock_aws

    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    with mock_aws():
        yield


@pytest.mark.usefixtures("cloud")
def test_the_roles_let_nodes_use_the_bucket_and_nothing_else() -> None:
    import boto3

    from deploy import aws_roles

    iam = boto3.client("iam")
    aws_roles.make(iam, ["bucket-a"])
    aws_roles.make(iam, ["bucket-a", "bucket-b"])  # again, with more
    for name in (aws_roles.HEAD, aws_roles.WORKER):
        profile = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
        assert [role["RoleName"] for role in profile["Roles"]] == [name]
        statements = iam.get_role_policy(RoleName=name, PolicyName="ray-qa")["PolicyDocument"]["Statement"]
        actions = {action for each in statements for action in _listed(each["Action"])}
        assert "*" not in actions and not any(action.endswith(":*") for action in actions)
        buckets = {place for each in statements for place in _listed(each["Resource"]) if ":s3:::" in place}
        assert buckets == {f"arn:aws:s3:::bucket-{letter}{end}" for letter in "ab" for end in ("", "/*")}
        services = {action.partition(":")[0] for action in actions}
        assert services == ({"s3"} if name == aws_roles.WORKER else {"s3", "ec2", "ssm", "iam"})
    aws_roles.delete(iam)
    assert not iam.list_roles()["Roles"]


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


@pytest.mark.usefixtures("cloud")
def test_ray_up_completes_the_file_for_aws(aws: dict[str, Any]) -> None:
    """Ray's own bootstrap: key, network, security group, profiles; and a head is started from what comes out."""
    import boto3
    from ray.autoscaler._private.aws import config as bootstrap
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    from deploy import aws_roles

    aws_roles.make(boto3.client("iam"), ["bucket"])
    prepared = prepare_config(copy.deepcopy(aws))
    prepared["cluster_name"] = "test-of-cluster-yaml"
    prepared["auth"]["ssh_private_key"] = __file__  # any file: Ray only looks whether it is there
    for kind in prepared["available_node_types"].values():
        kind["node_config"]["KeyName"] = "my-key"
    boto3.client("ec2").create_key_pair(KeyName="my-key")
    validate_config(prepared)
    filled = AWSNodeProvider.fillout_available_node_types_resources(prepared)
    done = bootstrap.bootstrap_aws(filled)
    types = done["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert types["cpu_worker"]["resources"]["CPU"] == 16
    assert (types["gpu_worker"]["resources"]["CPU"], types["gpu_worker"]["resources"]["GPU"]) == (4, 1)
    for name, kind in types.items():
        node = kind["node_config"]
        assert node["ImageId"].startswith("resolve:ssm:/aws/service/"), name
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert node["IamInstanceProfile"] == {"Name": aws_roles.HEAD if name == "head" else aws_roles.WORKER}
        assert node["SecurityGroupIds"] and node["SubnetIds"]
    group = boto3.client("ec2").describe_security_groups(GroupIds=types["head"]["node_config"]["SecurityGroupIds"])
    opened = {
        (rule.get("FromPort"), spread["CidrIp"])
        for each in group["SecurityGroups"] for rule in each["IpPermissions"] for spread in rule["IpRanges"]
    }
    assert opened == {(22, "0.0.0.0/0")}  # SSH with a key; everything else only among the nodes


# --- Kubernetes ------------------------------------------------------------------------------------------------------

_STRING: dict[str, Any] = {"type": "string"}
_WHOLE: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_MAP = {"type": "object", "additionalProperties": _STRING}


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(required), "additionalProperties": False
    }


#: The fields of ray.io/v1 in KubeRay 1.6 as far as this file could use them, reconstructed from KubeRay's API
#: reference: the definition itself is in no package. Pods ("template") are checked against Kubernetes' own schema.
_GROUP = dict(rayStartParams=_MAP, template={"type": "object"})
RAY_CLUSTER = _object(
    ("headGroupSpec",),
    rayVersion=_STRING, enableInTreeAutoscaling={"type": "boolean"}, suspend={"type": "boolean"}, managedBy=_STRING,
    headServiceAnnotations=_MAP, gcsFaultToleranceOptions={"type": "object"},
    authOptions=_object(
        mode={"enum": ["disabled", "token"]}, secretName=_STRING, enableK8sTokenAuth={"type": "boolean"}
    ),
    autoscalerOptions=_object(
        version={"enum": ["v1", "v2"]}, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        idleTimeoutSeconds=_WHOLE, resources={"type": "object"}, image=_STRING, imagePullPolicy=_STRING,
        env={"type": "array"}, envFrom={"type": "array"}, volumeMounts={"type": "array"},
        securityContext={"type": "object"},
    ),
    headGroupSpec=_object(
        ("template",), **_GROUP, serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]},
        headService={"type": "object"}, enableIngress={"type": "boolean"},
    ),
    workerGroupSpecs={"type": "array", "items": _object(
        ("groupName", "template", "minReplicas", "maxReplicas"), **_GROUP, groupName=_STRING, replicas=_WHOLE,
        minReplicas=_WHOLE, maxReplicas=_WHOLE, numOfHosts=_WHOLE, idleTimeoutSeconds=_WHOLE,
        suspend={"type": "boolean"}, scaleStrategy={"type": "object"},
    )},
)
RAY_JOB = _object(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"}, kind={"const": "RayJob"}, metadata=_object(("name",), name=_STRING, labels=_MAP),
    spec=_object(
        entrypoint=_STRING, runtimeEnvYAML=_STRING, jobId=_STRING, metadata=_MAP, clusterSelector=_MAP,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        submitterPodTemplate={"type": "object"}, submitterConfig=_object(backoffLimit=_WHOLE),
        activeDeadlineSeconds=_WHOLE | {"minimum": 1}, backoffLimit=_WHOLE, ttlSecondsAfterFinished=_WHOLE,
        shutdownAfterJobFinishes={"type": "boolean"}, suspend={"type": "boolean"}, managedBy=_STRING,
        deletionStrategy={"type": "object"},
        entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"},
        entrypointResources=_STRING, rayClusterSpec=RAY_CLUSTER,
    ),
)


@pytest.fixture
def ray_job() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "kuberay-rayjob.yaml").read_text())
    return found


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [*(group["template"] for group in groups), spec["submitterPodTemplate"]]


def test_the_ray_job_fits_the_definition(ray_job: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(RAY_JOB).validate(ray_job)
    for wrong in ({"ttlSecondsAfterFinish": 1}, {"activeDeadlineSeconds": "1 day"}, {"submissionMode": "Job"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(ray_job | {"spec": ray_job["spec"] | wrong}, RAY_JOB)


def test_its_pods_fit_the_schema_of_kubernetes(ray_job: dict[str, Any]) -> None:
    import kubernetes_validate

    def check(template: dict[str, Any]) -> None:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
        kubernetes_validate.validate(pod, "1.31", strict=True)

    assert len(pods(ray_job)) == 4
    for template in pods(ray_job):
        check(template)
    template["spec"]["containers"][0]["imag"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        check(template)


def test_the_ray_job_keeps_its_promises(ray_job: dict[str, Any]) -> None:
    spec = ray_job["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0 and spec["activeDeadlineSeconds"] > 0
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert all(group["minReplicas"] == 0 for group in spec["rayClusterSpec"]["workerGroupSpecs"])
    ray_version = re.search(r"^ray==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.M)
    assert ray_version is not None and spec["rayClusterSpec"]["rayVersion"] == ray_version[1]
    assert f"rayproject/ray:{ray_version[1]}-py311" in (DEPLOY / "Dockerfile").read_text()
    for template in pods(ray_job):
        assert template["spec"]["securityContext"]["runAsNonRoot"]
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert not re.search("latest$", container["image"])
            assert not any("TOKEN" in entry["name"] or "SECRET" in entry["name"] for entry in container.get("env", ()))


def test_the_entry_point_is_a_command_that_there_is(
    ray_job: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from ray_qa import cli

    words = ray_job["spec"]["entrypoint"].split()
    assert words[0] == "ray-qa"
    assert cli.main([word for word in words[1:] if word != "--use-gpu"] + ["--max-seq-length", "1"]) == 2
    assert "max_seq_length" in capsys.readouterr().err  # the rest of it was understood


def test_the_runtime_environment_is_one_that_ray_takes() -> None:
    from ray.runtime_env import RuntimeEnv

    text = (DEPLOY / "runtime-env.yaml").read_text()
    told = yaml.safe_load(text)
    told["working_dir"] = "https://host/package.zip"  # Ray uploads a folder before it looks at the rest
    made = RuntimeEnv(**told)
    assert "transformers" in made.pip_config()["packages"]
    assert not any(re.search("KEY|TOKEN|SECRET", name) for name in told["env_vars"])
    pinned = (REPOSITORY / "constraints.txt").read_text()
    assert all(f"\n{name}==" in pinned for name in told["pip"]["packages"][1:])
